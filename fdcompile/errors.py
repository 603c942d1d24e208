"""What fdcompile raises, and how it warns."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import warnings
from pathlib import Path


class FdcompileError(Exception):
    """Base of all of them. Arguments of a wrong type or value raise Python's TypeError and ValueError."""


class CaptureError(FdcompileError, RuntimeError):
    """The UNet could not be exported; the message names the module and the line, and says what to do."""


class PassError(FdcompileError, RuntimeError):
    """A pass failed or left a malformed graph; the message names it, the passes before it, and a graph to repeat it."""


class PackageError(FdcompileError, ValueError):
    """A package does not fit the pipe, this machine, or the call that it is asked to answer."""


def warn_user(message: str) -> None:
    """Warns with the line of the user's code that led here, as ``skip_file_prefixes`` does from Python 3.12 on."""
    frame, level = sys._getframe(1), 2
    while frame.f_code.co_filename.startswith(_libraries()) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


@functools.cache
def _libraries() -> tuple[str, ...]:
    """The folders of this package and of those through which a pipeline calls it."""
    specs = [importlib.util.find_spec(name) for name in ("accelerate", "diffusers", "torch")]
    paths = [path for spec in specs if spec is not None for path in spec.submodule_search_locations or ()]
    return tuple(f"{path}{os.sep}" for path in (Path(__file__).parent, *paths))
