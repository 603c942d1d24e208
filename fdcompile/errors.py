"""What fdcompile raises of its own."""

from __future__ import annotations


class FdcompileError(Exception):
    """Base of all of them. Arguments of a wrong type or value raise Python's TypeError and ValueError."""


class CaptureError(FdcompileError, RuntimeError):
    """The UNet could not be exported; the message names the module and the line, and says what to do."""


class PassError(FdcompileError, RuntimeError):
    """A pass failed or left a malformed graph; the message names it, the passes before it, and a graph to repeat it."""


class PackageError(FdcompileError, ValueError):
    """A package does not fit the pipe, this machine, or the call that it is asked to answer."""
