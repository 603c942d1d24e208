"""Exceptions and warnings."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import warnings
from pathlib import Path


class FdcompileError(Exception):
    """Base class of all exceptions. Arguments of a wrong type or value raise TypeError and ValueError instead."""


class CaptureError(FdcompileError, RuntimeError):
    """The UNet could not be exported. The message names the module, the line and a remedy."""


class PassError(FdcompileError, RuntimeError):
    """A pass failed or produced a malformed graph. The message names the pass, the passes before it, and its input."""


class PackageError(FdcompileError, ValueError):
    """A package does not match the pipeline, the machine or a call."""


def warn_user(message: str) -> None:
    """Warns at the innermost line of user code, like ``skip_file_prefixes`` in Python 3.12."""
    frame, level = sys._getframe(1), 2
    while frame.f_code.co_filename.startswith(_libraries()) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


@functools.cache
def _libraries() -> tuple[str, ...]:
    """Folders of this package and of the libraries through which a pipeline calls it."""
    specs = [importlib.util.find_spec(name) for name in ("accelerate", "diffusers", "torch")]
    paths = [path for spec in specs if spec is not None for path in spec.submodule_search_locations or ()]
    return tuple(f"{path}{os.sep}" for path in (Path(__file__).parent, *paths))
