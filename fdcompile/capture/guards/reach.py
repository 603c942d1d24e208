"""Finds the state and the code that a UNet's Python code can reach, and that a trace reads only once."""

from __future__ import annotations

import argparse
import array
import contextvars
import ctypes
import enum
import functools
import itertools
import random
import threading
import types
import weakref
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from fdcompile.capture.guards.functions import code_of_function, home_of, namespaces_of, places_of_function
from fdcompile.capture.guards.places import FORWARDS, Namespace, Place, is_dunder, is_library, is_users_module

CONSTANTS = {type(None), bool, int, float, str, complex, bytes, torch.dtype, torch.device}
_CONSTANTS = (enum.Enum, np.number, np.bool_)
"""Types of values that do not change. Members of enumerations may have attributes of users."""

MACHINERY = vars(nn.Module()).keys()
"""Attributes that every module has from ``nn.Module``."""

NOT_READ = MACHINERY | {"forward", "_diffusers_hook", "_hf_hook", "_old_forward"}
"""Attributes of a module that its forward does not read: those of ``nn.Module`` and of hooks around the forward."""

_CONTAINERS = {dict, list, tuple}
ARRAYS = (np.ndarray, array.array, bytearray, memoryview)
"""Types of arrays, which do not count their writes."""

MUTABLE = {dict, list, set, deque, OrderedDict, defaultdict, Counter, types.MappingProxyType}
"""Built-in types of containers whose entries may be replaced."""

_HOLDERS: tuple[type, ...] = (types.SimpleNamespace, argparse.Namespace, UserDict, UserList, threading.local, ChainMap)
_HOLDERS += (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)
"""Types of the standard library whose objects hold attributes of users."""

_OPAQUE: tuple[type, ...] = (random.Random, np.random.Generator, np.random.RandomState, contextvars.ContextVar)
_OPAQUE += (ctypes._SimpleCData, ctypes.Structure, ctypes.Union, ctypes.Array)
"""Types with state that cannot be compared."""

_WRAPPERS: tuple[type, ...] = (staticmethod, classmethod, property, functools.cached_property)
_WRAPPERS += (functools.partialmethod, functools._lru_cache_wrapper)
"""Types of what stands in the place of a function and calls it."""

_VIEWS: Any = (type({}.keys()), type({}.values()), type({}.items()))

_NOT_CALLED = {"__init__", "__new__", "__init_subclass__"}
"""Methods of classes that do not run in a forward."""

_CALLS = {"__call__", "_call_impl", "_wrapped_call_impl"}
"""Methods of ``nn.Module`` that run when a module is called."""


def is_plain(value: Any) -> bool:
    """Whether `value` is a number, flag or string, or a container of only these."""
    if type(value) not in _CONTAINERS:
        return type(value) in CONSTANTS or issubclass(type(value), _CONSTANTS)
    entries = itertools.chain(value, value.values()) if isinstance(value, dict) else value
    try:
        return all(map(is_plain, entries))
    except RecursionError:  # it contains itself
        return False


@dataclass
class Reached:
    """Everything reached: objects with attributes, containers, arrays, other places of values, and other tensors.

    Attributes:
        modules: torch modules.
        code: places of functions and modules of libraries, which hold no state.
        opaque: objects with state that cannot be compared.
    """

    modules: list[nn.Module] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)
    containers: list[Any] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    namespaces: dict[int, Namespace] = field(default_factory=dict)
    code: list[Place] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    arrays: list[Any] = field(default_factory=list)
    opaque: list[Any] = field(default_factory=list)

    def add(self, namespace: Namespace) -> None:
        known = self.namespaces.setdefault(id(namespace.owner), namespace)
        known.added = None if known.added is None or namespace.added is None else known.added | namespace.added


def reach(roots: Iterable[Any], known: Iterable[nn.Module] = ()) -> Reached:
    """Everything reachable from `roots`, except from `known` modules.

    Objects of libraries are entered if they are a root or an attribute of a module, as attention processors are.
    """
    reached = Reached()
    seen = set(map(id, known))
    pending = [(value, True) for value in roots]
    while pending:
        value, is_root = pending.pop()
        if type(value) in CONSTANTS or id(value) in seen:
            continue
        seen.add(id(value))
        try:
            is_module = issubclass(type(value), nn.Module)
            pending += [(entry, is_module) for entry in _enter(value, is_root, reached)]
        except Exception:  # such as that of an object whose ``__class__`` is a property
            reached.opaque.append(value)
    return reached


def _is_opaque(value: Any) -> bool:
    """Whether `value` has state that cannot be compared, such as an iterator; not ``random``'s own generator."""
    iterates = isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools")
    return iterates or (isinstance(value, _OPAQUE) and value is not random._inst)


def _enter(value: Any, is_root: bool, reached: Reached) -> Iterator[Any]:
    """Adds `value` to `reached`, and yields what it refers to."""
    is_users = not is_library(type(value).__module__)
    if type(value) in weakref.ProxyTypes:
        yield value.__repr__.__self__
        return
    if type(value) in MUTABLE or (is_users and isinstance(value, dict | list | set | deque)):
        reached.containers.append(value)
        yield from _in_order(value)
        yield from value.values() if isinstance(value, Mapping) else ()
        if not is_users:
            return
    if issubclass(type(value), nn.Module) and "_modules" in vars(value):
        if isinstance(value, torch.jit.ScriptModule):  # its code and attributes do not change
            return
        reached.modules.append(value)
        yield from (attribute for name, attribute in vars(value).items() if name not in NOT_READ)
        yield from value._modules.values()
        yield type(value)
    elif isinstance(value, torch.Tensor):
        is_dense = value.layout is torch.strided
        (reached.tensors if is_dense else reached.opaque).append(value)
    elif isinstance(value, ARRAYS):
        reached.arrays.append(value)
        yield from value.ravel().tolist() if isinstance(value, np.ndarray) and value.dtype.hasobject else ()
    elif _is_opaque(value):
        reached.opaque.append(value)
    elif isinstance(value, _VIEWS):
        yield value.mapping
    elif isinstance(value, tuple | frozenset):
        yield from _in_order(value)
        yield type(value)
    elif isinstance(value, types.FunctionType):
        if is_root or not is_library(home_of(value)):
            reached.objects.append(value)
            yield from vars(value).values()
        namespaces = namespaces_of(value)
        yield from _at(places_of_function(value, namespaces), reached.places)
        for called in _at(code_of_function(value, namespaces), reached.code):
            if not isinstance(called, type):  # a class is entered when an instance is reached
                yield called
        for namespace in namespaces if not is_library(home_of(value)) else ():
            reached.add(namespace)
    elif isinstance(value, _WRAPPERS):
        yield from (getattr(value, name, None) for name in ("__func__", "fget", "func", "__wrapped__"))
    elif isinstance(value, weakref.ref):
        yield value()
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.BuiltinMethodType):
        yield value.__self__
    elif isinstance(value, types.ModuleType):
        yield from _at(_settings(value), reached.places)
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


def _in_order(entries: Iterable[Any]) -> Iterable[Any]:
    """`entries`, in an order that is the same in another process; a set has no such order."""
    return sorted(entries, key=_order) if isinstance(entries, set | frozenset) else entries


def _order(value: Any) -> str:
    value = value() if isinstance(value, weakref.ref) else value
    attributes = getattr(value, "__dict__", {}).items()
    return repr((type(value).__qualname__, [(name, entry) for name, entry in attributes if is_plain(entry)]))


def _enter_class(value: type, reached: Reached) -> Iterator[Any]:
    reached.add(Namespace(value, None))
    yield from value.__bases__
    known = reached.code if is_library(value.__module__) else reached.places
    yield from _at((Place(value, name) for name in _read_names(value)), known)
    if not is_library(value.__module__):
        yield from (type(value), getattr(value, "__call__", None))  # noqa: B004 the value, not its existence


def _read_names(kind: type) -> list[str]:
    """Names of a class that a forward may read or call."""
    members, home = vars(kind).items(), kind.__module__
    if not is_library(home):
        called = [name for name, member in members if not is_dunder(name) or callable(member)]
        return [name for name in called if name not in _NOT_CALLED]
    called = [*(_CALLS & vars(kind).keys())]
    if not str(home).startswith(("diffusers.", "peft.", "torch.nn.")):
        return called
    runs = home.startswith(FORWARDS) and kind is not nn.Module and home != "diffusers.models.modeling_utils"
    return called + [name for name, member in members if not is_dunder(name) and (runs or is_plain(member))]


def _settings(module: types.ModuleType) -> Iterator[Place]:
    """Names of a user's module, which code reaches other than by a name, except code and other modules."""
    if is_users_module(module):
        for name, value in vars(module).items():
            if not (is_dunder(name) or callable(value) or isinstance(value, types.ModuleType)):
                yield Place(module, name)


def _at(places: Iterable[Place], known: list[Place]) -> Iterator[Any]:
    for place in places:
        known.append(place)
        yield place.value()


def _slots(value: Any) -> list[str]:
    kinds = (kind for kind in type(value).__mro__ if "__slots__" in vars(kind))
    members = (member for kind in kinds for member in vars(kind).values())
    return [member.__name__ for member in members if isinstance(member, types.MemberDescriptorType)]
