"""Places of values outside of objects, and whose code it is that they belong to."""

from __future__ import annotations

import gc
import itertools
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ABSENT = object()
"""Value of a place that has none."""

_LIBRARIES = {"accelerate", "diffusers", "fdcompile", "numpy", "peft", "torch", "torchao", "transformers"}
_LIBRARIES |= sys.stdlib_module_names - {"__main__"}
FORWARDS = ("diffusers.models", "peft.tuners", "torch.nn.modules")
"""Library modules with the code of a UNet's forward; functions that it calls in other modules count as operations."""


def is_library(module: Any) -> bool:
    """Whether `module`, a ``__module__``, belongs to Python or to a library that keeps no user state.

    That of types that are defined in C may be no string.
    """
    return not isinstance(module, str) or module.partition(".")[0] in _LIBRARIES


def is_users_module(value: Any) -> bool:
    return isinstance(value, types.ModuleType) and not is_library(value.__name__)


def is_dunder(name: str) -> bool:
    return name.startswith("__")


@dataclass(frozen=True)
class Place:
    """Place of a value: a closure's cell, a slot, a default, a class, a module, or a dict of global names."""

    owner: Any
    name: str

    @property
    def namespace(self) -> Mapping[str, Any] | None:
        """The names of a class or a module, or the dict; None for other places."""
        if isinstance(self.owner, type | types.ModuleType):
            return vars(self.owner)
        return self.owner if isinstance(self.owner, dict) else None

    def value(self) -> Any:
        """The value, or `ABSENT`."""
        if (names := self.namespace) is not None:
            return names.get(self.name, ABSENT)
        try:
            return getattr(self.owner, self.name, ABSENT)
        except ValueError:  # the cell is empty
            return ABSENT

    def put(self, value: Any) -> None:
        """Sets the value, or removes it if `value` is `ABSENT`, also where a class of a user refuses that."""
        kind: Any = next(kind for kind in (dict, type, object) if isinstance(self.owner, kind))
        if kind is dict:
            self.owner.pop(self.name) if value is ABSENT else self.owner.update({self.name: value})
        elif value is ABSENT:
            kind.__delattr__(self.owner, self.name)
        else:
            kind.__setattr__(self.owner, self.name, value)


@dataclass
class Namespace:
    """A class, a module, or a dict of global names, to which code may add names.

    Attributes:
        owner: the class, the module or the dict.
        added: names that code may add; None for any but those that Python adds itself.
    """

    owner: Any
    added: set[str] | None

    @property
    def names(self) -> dict[str, Any]:
        """All names and their values; of a class the dict behind ``__dict__``."""
        names: Any = self.owner if isinstance(self.owner, dict) else vars(self.owner)
        return gc.get_referents(names)[0] if isinstance(self.owner, type) else names  # type: ignore[no-any-return]

    def current(self) -> dict[str, Any]:
        """Names that code may have added, in order, with their values."""
        names = self.names
        added = names.keys() & self.added if self.added is not None else itertools.filterfalse(is_dunder, names)
        return {name: names[name] for name in sorted(added)}
