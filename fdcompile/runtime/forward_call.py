"""A call that a hook passes to the executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fdcompile.runtime.caller import Caller


@dataclass(frozen=True, slots=True)
class ForwardCall:
    """A call of the UNet or of a ControlNet.

    Attributes:
        forward: the stock forward.
        wrapped: whether `forward` is not the forward of the part's class.
        args: positional arguments.
        kwargs: keyword arguments.
        scheduler: the scheduler of the session.
        find_caller: finds the pipeline that makes the call; used once per run.
    """

    forward: Callable[..., Any]
    wrapped: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    scheduler: Any
    find_caller: Callable[[], Caller]
