"""What a UNet is, in words that are the same for an equal one in another process."""

from __future__ import annotations

import hashlib
import json
import types
from typing import Any

from torch import nn

from fdcompile.capture.guards.reach import Place, is_library
from fdcompile.capture.guards.snapshot import is_baked, reach_of


def fingerprint(unet: nn.Module) -> str:
    """Sha256 of the types of a UNet's modules and attention processors and of the plain values on them."""
    parts: list[Any] = []
    for path, module in unet.named_modules():
        for owner in filter(None, (module if path else None, vars(module).get("processor"))):
            values = {name: value for name, value in vars(owner).items() if is_baked(name, value)}
            parts.append((path, type(owner).__qualname__, values))
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def replaced_code(unet: nn.Module) -> list[str]:
    """Names of functions and methods of libraries that a UNet calls, and in whose place somebody has put others.

    An equal UNet in another process does not have them there.
    """
    names = {f"{_name(place.owner)}.{place.name}" for place in reach_of(unet).code if not _at_home(place)}
    return sorted(names)


def _at_home(place: Place) -> bool:
    """Whether what is at `place` was written in a library, or where `place` is."""
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
    return f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else str(owner.__name__)
