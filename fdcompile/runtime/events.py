"""What the hooks on a pipeline tell the executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fdcompile.runtime.caller import Caller


@dataclass(frozen=True, slots=True)
class Called:
    """A call of the UNet or of a ControlNet.

    Attributes:
        forward: the stock forward.
        wrapped: whether `forward` is more than that of the part's class.
        scheduler: the one that is followed.
        find_caller: finds the pipeline that makes the call; needed once a run.
    """

    forward: Callable[..., Any]
    wrapped: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    scheduler: Any
    find_caller: Callable[[], Caller]
