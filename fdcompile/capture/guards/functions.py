"""What a function reads outside of its arguments, as its code says."""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import types
from collections.abc import Iterator
from typing import Any

from fdcompile.capture.guards.places import FORWARDS, Namespace, Place, is_library, is_users_module

_OF_GLOBALS = ("_GLOBAL", "_NAME")
"""Ends of the names of instructions for global names."""


def places_of_function(function: types.FunctionType, namespaces: list[Namespace]) -> Iterator[Place]:
    """Cells of the closure of `function` and, for user code, its defaults and the globals that it reads."""
    yield from (Place(cell, "cell_contents") for cell in function.__closure__ or ())
    if not is_library(home_of(function)):
        yield from (Place(function, name) for name in ("__code__", "__defaults__", "__kwdefaults__"))
        for owner, name, value in _reads(namespaces):
            if not isinstance(value, types.ModuleType) and not _is_library_code(value):
                yield Place(owner, name)


def code_of_function(function: types.FunctionType, namespaces: list[Namespace]) -> Iterator[Place]:
    """Library code that `function` calls by a global name, or as an attribute of a module with a global name."""
    names, home = _names(function.__code__), home_of(function)
    for owner, name, value in _reads(namespaces):
        if isinstance(value, types.ModuleType):
            yield from (Place(value, called) for called in sorted(names) if callable(vars(value).get(called)))
        elif _is_library_code(value) or (callable(value) and is_library(home)):  # or its replacement
            yield Place(owner, name)


def _reads(namespaces: list[Namespace]) -> Iterator[tuple[Any, str, Any]]:
    """Names that a function may read in `namespaces`, with their owners and values."""
    for namespace in namespaces:
        yield from ((namespace.owner, name, value) for name, value in namespace.current().items())


def namespaces_of(function: types.FunctionType) -> list[Namespace]:
    """The module of `function`, or the dict of its globals, and modules of users that it may read.

    None for functions of libraries that count as operations.
    """
    home, names = home_of(function), _names(function.__code__)
    if is_library(home) and not home.startswith(FORWARDS):
        return []
    module = sys.modules.get(home)
    is_own = module is not None and vars(module) is function.__globals__
    namespaces = [Namespace(module if is_own else function.__globals__, _global_names(function.__code__))]
    modules = [] if is_library(home) else [*map(sys.modules.get, _imported(function))]
    for namespace in namespaces:
        modules += namespace.current().values()
        known = [each.owner for each in namespaces]
        new = (module for module in modules if is_users_module(module) and module not in known)
        namespaces += (Namespace(module, names) for module in dict.fromkeys(new))
        modules = []
    return namespaces


def _imported(function: types.FunctionType) -> list[str]:
    """Names of modules that `function` may import, also relative to its package and the packages around that."""
    packages = itertools.accumulate(str(function.__globals__.get("__package__") or "").split("."), "{}.{}".format)
    prefixes = ["", *(f"{package}." for package in packages)]
    return [prefix + name for prefix in prefixes for name in sorted(_names(function.__code__))]


def home_of(function: types.FunctionType) -> str:
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


@functools.cache
def _global_names(code: types.CodeType) -> set[str]:
    inner = (_global_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    used = {each.argval for each in dis.get_instructions(code) if each.opname.endswith(_OF_GLOBALS)}
    return used.union(*inner)
