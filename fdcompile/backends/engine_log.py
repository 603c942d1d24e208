"""Logging and interrupts of TensorRT."""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

LOGGER = logging.getLogger("fdcompile.tensorrt")
"""Receives messages of TensorRT: warnings as such, all others at level DEBUG. Errors are also raised."""


@functools.cache
def log_of(trt: Any) -> Any:
    """Logger of the module `trt`, one for the whole process, because TensorRT keeps the first one it receives."""

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
    """Yields a list that collects the errors that TensorRT reports in the block."""
    log = log_of(trt)
    log.errors = []
    yield log.errors


@contextlib.contextmanager
def held_interrupts() -> Iterator[list[int]]:
    """Collects SIGINT in the block and raises it at the end, since TensorRT ignores exceptions in its callbacks."""
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
