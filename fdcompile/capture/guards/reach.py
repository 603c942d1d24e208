"""What Python code of a user's can reach from a UNet: its state, which a trace runs through once and no more."""

from __future__ import annotations

import functools
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

CONSTANTS = {type(None), bool, int, float, str}

MACHINERY = vars(nn.Module()).keys()
"""Attributes that every module has from ``nn.Module``."""

_CONTAINERS = {dict, list, tuple}
_MUTABLE = {dict, list, set, deque, OrderedDict, defaultdict}
_LIBRARIES = {"accelerate", "diffusers", "fdcompile", "numpy", "peft", "torch", "transformers"}
_LIBRARIES |= sys.stdlib_module_names - {"__main__"}


def is_plain(value: Any) -> bool:
    """Whether `value` is a number, flag or string, or made of nothing else."""
    if type(value) not in _CONTAINERS:
        return type(value) in CONSTANTS
    entries = value.values() if isinstance(value, dict) else value
    return CONSTANTS.issuperset(map(type, entries)) or all(map(is_plain, entries))


def is_library(module: str) -> bool:
    """Whether code in `module` is of Python or of a library that keeps no state of a user's."""
    return module.partition(".")[0] in _LIBRARIES


@dataclass(frozen=True)
class Place:
    """An attribute that is in no ``__dict__``: a closure's cell, a slot, a class's or a module's."""

    owner: Any
    name: str

    def value(self) -> Any:
        if isinstance(self.owner, type):
            return vars(self.owner).get(self.name)
        return getattr(self.owner, self.name, None)

    def put(self, value: Any) -> None:
        setattr(self.owner, self.name, value)


@dataclass
class Reached:
    """What was found: objects with attributes, containers, other places of values, and tensors that no module owns."""

    objects: list[Any] = field(default_factory=list)
    containers: list[Any] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)


def reach(roots: Iterable[Any]) -> Reached:
    """Whatever can be reached from `roots`, the attributes of a UNet's modules, other modules aside.

    Objects of libraries are entered if they are a root, as an attention processor is, and no further.
    """
    found = Reached()
    seen: set[int] = set()
    pending = [(value, True) for value in roots]
    while pending:
        value, is_root = pending.pop()
        if id(value) in seen or isinstance(value, nn.Module) or is_plain(value):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.tensors.append(value)
            continue
        pending += ((entry, False) for entry in _enter(value, is_root, found))
    return found


def _enter(value: Any, is_root: bool, found: Reached) -> Iterator[Any]:
    """Notes `value` in `found`, and yields what it leads to."""
    if type(value) in _MUTABLE:
        found.containers.append(value)
        yield from value.values() if isinstance(value, dict) else value
    elif isinstance(value, tuple | frozenset):
        yield from value
    elif isinstance(value, types.FunctionType):
        if is_root:
            found.objects.append(value)
        yield from _at(_places_of_function(value), found)
    elif isinstance(value, staticmethod | classmethod):
        yield value.__func__
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        found.objects.append(value)
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, type):
        if not is_library(value.__module__):
            yield from _at((Place(value, name) for name in vars(value) if not name.startswith("__")), found)
            yield getattr(value, "__call__", None)  # noqa: B004 what it is, not whether it is there
    elif is_root or not is_library(type(value).__module__):
        if not (hasattr(value, "__dict__") or _slots(value)):
            return
        found.objects.append(value)
        yield from getattr(value, "__dict__", {}).values()
        yield from _at((Place(value, name) for name in _slots(value)), found)
        yield type(value)


def _at(places: Iterable[Place], found: Reached) -> Iterator[Any]:
    for place in places:
        found.places.append(place)
        yield place.value()


def _slots(value: Any) -> list[str]:
    names: list[str] = []
    for kind in type(value).__mro__:
        own = vars(kind).get("__slots__", ())
        names += [own] if isinstance(own, str) else own
    return [name for name in names if not name.startswith("__") and hasattr(value, name)]


def _places_of_function(function: types.FunctionType) -> Iterator[Place]:
    """Its closure, and what a user's reads of its module: values, not functions and classes."""
    yield from (Place(cell, "cell_contents") for cell in function.__closure__ or ())
    module = sys.modules.get(function.__module__)
    if is_library(function.__module__) or module is None or vars(module) is not function.__globals__:
        return
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if value is not None and not isinstance(value, types.FunctionType | types.ModuleType | type):
            yield Place(module, name)


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return {*code.co_names}.union(*inner)
