"""Finds the state and the code that a UNet's Python code can reach, and that a trace reads only once."""

from __future__ import annotations

import array
import functools
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

CONSTANTS = {type(None), bool, int, float, str}

MACHINERY = vars(nn.Module()).keys()
"""Attributes that every module has from ``nn.Module``."""

_CONTAINERS = {dict, list, tuple}
ARRAYS = (np.ndarray, array.array, bytearray)
"""Types of arrays, which do not count their writes."""

_MUTABLE = {dict, list, set, deque, OrderedDict, defaultdict}
_LIBRARIES = {"accelerate", "diffusers", "fdcompile", "numpy", "peft", "torch", "torchao", "transformers"}
_LIBRARIES |= sys.stdlib_module_names - {"__main__"}
_FORWARDS = ("diffusers.models", "peft.tuners", "torch.nn.modules")
"""Library modules with the code of a UNet's forward; functions that it calls in other modules count as operations."""

_CALLS = {"__call__", "_call_impl", "_wrapped_call_impl"}
"""Methods of ``nn.Module`` that run when a module is called."""


def is_plain(value: Any) -> bool:
    """Whether `value` is a number, flag or string, or a container of only these."""
    if type(value) not in _CONTAINERS:
        return type(value) in CONSTANTS
    entries = value.values() if isinstance(value, dict) else value
    return CONSTANTS.issuperset(map(type, entries)) or all(map(is_plain, entries))


def is_library(module: str) -> bool:
    """Whether `module` belongs to Python or to a library that keeps no user state."""
    return module.partition(".")[0] in _LIBRARIES


@dataclass(frozen=True)
class Place:
    """Place of a value that is in no object's ``__dict__``: a closure's cell, a slot, a class or a module."""

    owner: Any
    name: str

    def value(self) -> Any:
        """The value; None if there is none."""
        if isinstance(self.owner, type | types.ModuleType):
            return vars(self.owner).get(self.name)
        try:
            return getattr(self.owner, self.name, None)
        except ValueError:  # the cell is empty
            return None

    def put(self, value: Any) -> None:
        setattr(self.owner, self.name, value)


@dataclass
class Reached:
    """Everything reached: objects with attributes, containers, arrays, other places of values, and other tensors.

    Attributes:
        code: places of functions and modules of libraries, which hold no state.
    """

    objects: list[Any] = field(default_factory=list)
    containers: list[Any] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    code: list[Place] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    arrays: list[Any] = field(default_factory=list)


def reach(roots: Iterable[Any]) -> Reached:
    """Everything reachable from `roots`, the attributes and classes of a UNet's modules, except other modules.

    Objects of libraries are entered if they are a root, as an attention processor is, and no further.
    """
    reached = Reached()
    seen: set[int] = set()
    pending = [(value, True) for value in roots]
    while pending:
        value, is_root = pending.pop()
        if id(value) in seen or isinstance(value, nn.Module) or is_plain(value):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            reached.tensors.append(value)
            continue
        if isinstance(value, ARRAYS):
            reached.arrays.append(value)
            continue
        pending += ((entry, False) for entry in _enter(value, is_root, reached))
    return reached


def _enter(value: Any, is_root: bool, reached: Reached) -> Iterator[Any]:
    """Adds `value` to `reached`, and yields what it refers to."""
    if type(value) in _MUTABLE:
        reached.containers.append(value)
        yield from value.values() if isinstance(value, dict) else value
    elif isinstance(value, tuple | frozenset):
        yield from value
    elif isinstance(value, types.FunctionType):
        if is_root:
            reached.objects.append(value)
        yield from _at(_places_of_function(value), reached.places)
        for called in _at(_code_of_function(value), reached.code):
            if not isinstance(called, type):  # a class is entered when an instance is reached
                yield called
    elif isinstance(value, staticmethod | classmethod):
        yield value.__func__
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        reached.objects.append(value)
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, type):
        yield from _enter_class(value, reached)
    elif is_root or not is_library(type(value).__module__):
        if not (hasattr(value, "__dict__") or _slots(value)):
            return
        reached.objects.append(value)
        yield from getattr(value, "__dict__", {}).values()
        yield from _at((Place(value, name) for name in _slots(value)), reached.places)
        yield type(value)


def _enter_class(value: type, reached: Reached) -> Iterator[Any]:
    if value is nn.Module:
        yield from _at((Place(value, name) for name in _CALLS), reached.code)
    elif not is_library(value.__module__):
        names = (name for name in vars(value) if name in _CALLS or not _is_dunder(name))
        yield from _at((Place(value, name) for name in names), reached.places)
    elif value.__module__.startswith(_FORWARDS) and value.__module__ != "diffusers.models.modeling_utils":
        yield from _at(
            (Place(value, name) for name, member in vars(value).items() if _is_method(name, member)), reached.code
        )
    else:
        return
    yield getattr(value, "__call__", None)  # noqa: B004 the value, not its existence
    yield from value.__bases__


def _is_method(name: str, value: Any) -> bool:
    return isinstance(value, types.FunctionType | staticmethod) and (name in _CALLS or not _is_dunder(name))


def _is_dunder(name: str) -> bool:
    return name.startswith("__")


def _at(places: Iterable[Place], known: list[Place]) -> Iterator[Any]:
    for place in places:
        known.append(place)
        yield place.value()


def _slots(value: Any) -> list[str]:
    names: list[str] = []
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return [name for name in names if not _is_dunder(name) and hasattr(value, name)]


def _places_of_function(function: types.FunctionType) -> Iterator[Place]:
    """Cells of the closure of `function` and, for user code, the globals that it reads."""
    yield from (Place(cell, "cell_contents") for cell in function.__closure__ or ())
    if not is_library(function.__module__):
        for module, name, value in _reads(function):
            if not isinstance(value, types.ModuleType) and not _is_library_code(value):
                yield Place(module, name)


def _code_of_function(function: types.FunctionType) -> Iterator[Place]:
    """Library code that `function` calls by a global name, or as an attribute of a module with a global name."""
    if is_library(function.__module__) and not function.__module__.startswith(_FORWARDS):
        return
    names = _names(function.__code__)
    for module, name, value in _reads(function):
        if isinstance(value, types.ModuleType):
            yield from (Place(value, called) for called in names if callable(vars(value).get(called)))
        elif _is_library_code(value) or (callable(value) and is_library(function.__module__)):  # or its replacement
            yield Place(module, name)


def _reads(function: types.FunctionType) -> Iterator[tuple[types.ModuleType, str, Any]]:
    """Global names that `function` reads, with their modules and values."""
    module = sys.modules.get(function.__module__)
    if module is None or vars(module) is not function.__globals__:
        return
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield module, name, function.__globals__[name]


def _is_library_code(value: Any) -> bool:
    """Whether `value` is a function or class of a library."""
    home = getattr(value, "__module__", None)
    return callable(value) and is_library(home if isinstance(home, str) else type(value).__module__)


@functools.cache
def _names(code: types.CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return {*code.co_names}.union(*inner)
