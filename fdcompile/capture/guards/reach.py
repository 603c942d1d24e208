"""Finds the state and the code that a UNet's Python code can reach, and that a trace reads only once."""

from __future__ import annotations

import argparse
import array
import contextvars
import ctypes
import functools
import random
import sys
import threading
import types
import weakref
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
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

MUTABLE = {dict, list, set, deque, OrderedDict, defaultdict, Counter, types.MappingProxyType}
"""Built-in types of containers whose entries may be replaced."""

_HOLDERS = (types.SimpleNamespace, argparse.Namespace, UserDict, UserList, threading.local)
"""Types of the standard library whose objects hold attributes of users."""

_OPAQUE: tuple[type, ...] = (random.Random, np.random.Generator, np.random.RandomState, contextvars.ContextVar)
_OPAQUE += (ctypes._SimpleCData, ctypes.Structure, ctypes.Union, ctypes.Array)
"""Types with state that cannot be compared."""

_WRAPPERS: tuple[type, ...] = (staticmethod, classmethod, property, functools.cached_property)
_WRAPPERS += (functools.partialmethod, functools._lru_cache_wrapper)
"""Types of what stands in the place of a function and calls it."""

_NOT_CALLED = {"__init__", "__new__", "__init_subclass__"}
"""Methods of classes that do not run in a forward."""

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
    try:
        return CONSTANTS.issuperset(map(type, entries)) or all(map(is_plain, entries))
    except RecursionError:  # it contains itself
        return False


def is_library(module: Any) -> bool:
    """Whether `module`, a ``__module__``, belongs to Python or to a library that keeps no user state.

    That of types that are defined in C may be no string.
    """
    return not isinstance(module, str) or module.partition(".")[0] in _LIBRARIES


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
        """The value; None if there is none."""
        if (names := self.namespace) is not None:
            return names.get(self.name)
        try:
            return getattr(self.owner, self.name, None)
        except ValueError:  # the cell is empty
            return None

    def put(self, value: Any) -> None:
        if isinstance(self.owner, dict):
            self.owner[self.name] = value
        else:
            setattr(self.owner, self.name, value)


@dataclass
class Reached:
    """Everything reached: objects with attributes, containers, arrays, other places of values, and other tensors.

    Attributes:
        code: places of functions and modules of libraries, which hold no state.
        opaque: objects with state that cannot be compared.
    """

    objects: list[Any] = field(default_factory=list)
    containers: list[Any] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    code: list[Place] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    arrays: list[Any] = field(default_factory=list)
    opaque: list[Any] = field(default_factory=list)


def reach(roots: Iterable[Any]) -> Reached:
    """Everything reachable from `roots`, the attributes and classes of a UNet's modules, except other modules.

    Objects of libraries are entered if they are a root, as an attention processor is, and no further.
    """
    reached = Reached()
    seen: set[int] = set()
    pending = [(value, True) for value in roots]
    while pending:
        value, is_root = pending.pop()
        if id(value) in seen or isinstance(value, nn.Module) or type(value) in CONSTANTS:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            reached.tensors.append(value)
        elif isinstance(value, ARRAYS):
            reached.arrays.append(value)
        elif _is_opaque(value):
            reached.opaque.append(value)
        else:
            pending += ((entry, False) for entry in _enter(value, is_root, reached))
    return reached


def _is_opaque(value: Any) -> bool:
    """Whether `value` has state that cannot be compared, such as an iterator; not ``random``'s own generator."""
    iterates = isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools")
    return iterates or (isinstance(value, _OPAQUE) and value is not random._inst)


def _enter(value: Any, is_root: bool, reached: Reached) -> Iterator[Any]:
    """Adds `value` to `reached`, and yields what it refers to."""
    is_users = not is_library(type(value).__module__)
    if type(value) in MUTABLE or (is_users and isinstance(value, dict | list | set | deque)):
        reached.containers.append(value)
        yield from value.values() if isinstance(value, Mapping) else value
        if not is_users:
            return
    if isinstance(value, tuple | frozenset):
        yield from value
    elif isinstance(value, types.FunctionType):
        if is_root or not is_library(_home(value)):
            reached.objects.append(value)
            yield from vars(value).values()
        yield from _at(_places_of_function(value), reached.places)
        for called in _at(_code_of_function(value), reached.code):
            if not isinstance(called, type):  # a class is entered when an instance is reached
                yield called
    elif isinstance(value, _WRAPPERS):
        yield from (getattr(value, name, None) for name in ("__func__", "fget", "func", "__wrapped__"))
    elif isinstance(value, weakref.ref):
        yield value()
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        reached.objects.append(value)
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, type):
        yield from _enter_class(value, reached)
    elif is_root or is_users or isinstance(value, _HOLDERS):
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
        members = vars(value).items()
        names = (name for name, member in members if not _is_dunder(name) or callable(member))
        yield from _at((Place(value, name) for name in names if name not in _NOT_CALLED), reached.places)
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
    """Cells of the closure of `function` and, for user code, its defaults and the globals that it reads."""
    yield from (Place(cell, "cell_contents") for cell in function.__closure__ or ())
    if not is_library(_home(function)):
        yield from (Place(function, name) for name in ("__defaults__", "__kwdefaults__"))
        for owner, name, value in _reads(function):
            if not isinstance(value, types.ModuleType) and not _is_library_code(value):
                yield Place(owner, name)


def _code_of_function(function: types.FunctionType) -> Iterator[Place]:
    """Library code that `function` calls by a global name, or as an attribute of a module with a global name."""
    names, home = _names(function.__code__), _home(function)
    if is_library(home) and not home.startswith(_FORWARDS):
        return
    for owner, name, value in _reads(function):
        if isinstance(value, types.ModuleType):
            yield from (Place(value, called) for called in names if callable(vars(value).get(called)))
        elif _is_library_code(value) or (callable(value) and is_library(home)):  # or its replacement
            yield Place(owner, name)


def _reads(function: types.FunctionType) -> Iterator[tuple[Any, str, Any]]:
    """Names that `function` may read in its globals and in modules of users, with their owners and values."""
    module, names = sys.modules.get(_home(function)), _names(function.__code__)
    is_own = module is not None and vars(module) is function.__globals__
    owners: list[Any] = [module if is_own else function.__globals__]
    if not is_library(_home(function)):  # modules that it imports
        imported = (sys.modules[name] for name in names & sys.modules.keys() if not is_library(name))
        owners += (other for other in imported if isinstance(other, types.ModuleType))
    for owner in owners:
        values = owner if isinstance(owner, dict) else vars(owner)
        for name in names & values.keys():
            value = values[name]
            yield owner, name, value
            if isinstance(value, types.ModuleType) and not is_library(value.__name__) and value not in owners:
                owners.append(value)


def _home(function: types.FunctionType) -> str:
    """Name of the module that `function` is written in; ``functools.wraps`` copies the ``__module__`` of another."""
    return str(function.__globals__.get("__name__", ""))


def _is_library_code(value: Any) -> bool:
    """Whether `value` is a function or class of a library."""
    home = getattr(value, "__module__", None)
    return callable(value) and is_library(home if isinstance(home, str) else type(value).__module__)


@functools.cache
def _names(code: types.CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return {*code.co_names}.union(*inner)
