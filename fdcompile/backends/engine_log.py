"""What TensorRT says, and Ctrl-C while it works."""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

LOGGER = logging.getLogger("fdcompile.tensorrt")
"""Takes what TensorRT says: its warnings as such, the rest at level DEBUG. Errors are in what is raised."""


@functools.cache
def log_of(trt: Any) -> Any:
    """What the module `trt` writes to: one for the whole process, because TensorRT keeps the first that it is given."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.Logger.ERROR:
                self.errors.append(message.strip())
            LOGGER.log(logging.WARNING if severity == trt.Logger.WARNING else logging.DEBUG, "%s", message)

    return Log()


@contextlib.contextmanager
def errors_of(trt: Any) -> Iterator[list[str]]:
    """The errors that TensorRT reports in the block."""
    log = log_of(trt)
    log.errors = []
    yield log.errors


@contextlib.contextmanager
def held_interrupts() -> Iterator[list[int]]:
    """Those of Ctrl-C in the block, held back until its end: TensorRT swallows what its callbacks into Python raise."""
    held: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield held
        return
    signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)
