"""Digests of a UNet that are equal for an equal UNet in another process."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import json
import numbers
import types
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from fdcompile.capture.guards.places import Place, is_library
from fdcompile.capture.guards.reach import ARRAYS, NOT_READ, Reached, is_plain, reach
from fdcompile.capture.guards.snapshot import is_baked
from fdcompile.graph.weights import plain_tensors, tensor_bytes

_VALUES = (numbers.Number, PurePath, range, slice, np.dtype, torch.layout, torch.memory_format)
"""Types of values that their representation describes."""


def fingerprint(unet: nn.Module) -> str:
    """Sha256 of the types of a UNet's modules and attention processors and of the plain values on them."""
    parts: list[Any] = []
    for path, module in unet.named_modules():
        for owner in filter(None, (module if path else None, vars(module).get("processor"))):
            values = {name: value for name, value in vars(owner).items() if is_baked(name, value)}
            parts.append((path, type(owner).__qualname__, values))
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def user_state(unet: nn.Module) -> dict[str, str]:
    """Digests, by name, of user code in a UNet and of what it reads besides modules and weights.

    These are attributes of attention processors and other objects, tensors, arrays, closures, globals, and the code.
    """
    facts: dict[str, list[str]] = defaultdict(list)
    modules = list(unet.modules())
    for path, module in unet.named_modules():
        if not path:
            continue
        values = {name: value for name, value in vars(module).items() if name not in NOT_READ}
        for name, value in [*values.items(), ("forward", type(module))]:
            if not (is_plain(value) or isinstance(value, FrozenDict)):
                reached = reach([value], known=modules)
                modules += reached.modules  # described once
                for fact, content in _facts(f"{path}.{name}", value, reached):
                    facts[fact].append(content)
    return {name: hashlib.sha256("\n".join(facts[name]).encode()).hexdigest()[:24] for name in sorted(facts)}


def _facts(path: str, root: Any, reached: Reached) -> Iterator[tuple[str, str]]:
    if isinstance(root, (torch.Tensor, types.FunctionType, types.MethodType, *ARRAYS)):
        yield path, _spell(root)
    for module in reached.modules:  # no part of the UNet
        yield path, _spell(type(module))
        for name, value in (*vars(module).items(), *module._parameters.items(), *module._buffers.items()):
            if name not in NOT_READ:
                yield f"{path}.{name}", _spell(value)
    for owner in reached.objects:
        if isinstance(owner, functools.partial):
            yield path, _spell((owner.func, owner.args, tuple(owner.keywords.items())))
        for name, value in getattr(owner, "__dict__", {}).items():
            yield f"{path}.{name}", _spell(value)
    for container in itertools.filterfalse(is_plain, reached.containers):
        entries = container.items() if isinstance(container, Mapping) else container
        yield path, " ".join(sorted(map(_spell, entries)) if isinstance(container, set) else map(_spell, entries))
    for place in reached.places:
        owner = place.owner
        if place.name == "__code__" or (isinstance(owner, types.CellType) and _is_of_library(root)):
            continue
        named = path if place.namespace is None else _name(owner)
        name = "closure" if isinstance(owner, types.CellType) else place.name
        yield f"{named}.{name}", _spell(place.value())


def _is_of_library(root: Any) -> bool:
    named = root if isinstance(root, type | types.FunctionType) else type(root)
    return is_library(named.__module__)


def _spell(value: Any) -> str:
    """Formats a value, the content of a tensor or array, the code or name of a function, or the type of an object."""
    if isinstance(value, tuple) and not is_plain(value):
        return " ".join(map(_spell, value))
    if isinstance(value, torch.Tensor):
        try:
            contents = [hashlib.sha256(tensor_bytes(part)).hexdigest() for part in plain_tensors(value)]
            return " ".join([str(value.dtype), str(tuple(value.shape)), *contents])
        except (RuntimeError, ValueError, NotImplementedError):  # it has no content, as on the meta device
            return f"{type(value).__qualname__} {value.dtype}"
    if isinstance(value, ARRAYS):
        array = np.asarray(value)
        if array.dtype.hasobject:
            return _spell((str(array.shape), *array.flat))
        return " ".join([str(array.dtype), str(array.shape), hashlib.sha256(array.tobytes()).hexdigest()])
    function = value.__func__ if isinstance(value, staticmethod | classmethod | types.MethodType) else value
    if isinstance(function, types.FunctionType) and not is_library(function.__module__):
        try:
            return inspect.getsource(function)
        except OSError:  # defined without a source file
            return _spell(function.__code__)
    if isinstance(value, types.CodeType):
        return _spell((value.co_code.hex(), value.co_names, *value.co_consts))
    if isinstance(value, frozenset):
        return " ".join(sorted(map(_spell, value)))
    if isinstance(function, type | types.FunctionType | types.BuiltinFunctionType):
        return f"{function.__module__}.{function.__qualname__}"
    return repr(value) if is_plain(value) or isinstance(value, _VALUES) else type(value).__qualname__


def replaced_code(unet: nn.Module) -> list[str]:
    """Names of library functions and methods that a UNet calls and that were replaced by others.

    A UNet in another process does not have these replacements.
    """
    return sorted({f"{_name(place.owner)}.{place.name}" for place in reach([unet]).code if not _at_home(place)})


def _at_home(place: Place) -> bool:
    """Whether the code at `place` is a library's, or is defined in the module of `place`."""
    value = place.value()
    function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
    if isinstance(function, types.FunctionType):
        home = function.__globals__.get("__name__")  # functools.wraps copies __module__
    else:
        home = getattr(function, "__module__", None)
        home = home if isinstance(home, str) else type(function).__module__
    top = _name(place.owner).partition(".")[0]
    return value is None or is_library(home or "") or str(home).partition(".")[0] == top


def _name(owner: Any) -> str:
    if isinstance(owner, dict):  # global names of code that belongs to no module
        return str(owner.get("__name__"))
    return f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else str(owner.__name__)
