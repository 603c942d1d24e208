"""Paired timing: each call is timed right after a stock call, since a machine's speed varies over time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

PAIRS = 3

Timer = Callable[[], float]


@dataclass(frozen=True)
class Pairs:
    """Seconds of alternating calls.

    Attributes:
        seconds: time of each call.
        stock_seconds: time of the stock call before each; empty without a comparison.
    """

    seconds: tuple[float, ...]
    stock_seconds: tuple[float, ...] = ()

    @property
    def ratios(self) -> tuple[float, ...]:
        """Time of each call as a share of the stock call before it."""
        pairs = zip(self.seconds, self.stock_seconds, strict=True) if self.stock_seconds else ()
        return tuple(spent / stock for spent, stock in pairs)

    @property
    def ratio(self) -> float | None:
        """Median of `ratios`."""
        return statistics.median(self.ratios) if self.stock_seconds else None


def device_timer(device: torch.device) -> Timer:
    """Returns a clock that synchronizes with `device`."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def seconds(call: Callable[[], Any], timer: Timer = time.perf_counter) -> float:
    """Returns the duration of one call."""
    began = timer()
    call()
    return timer() - began


def time_pairs(
    call: Callable[[], Any], stock: Callable[[], Any] | None, timer: Timer = time.perf_counter, pairs: int = PAIRS
) -> Pairs:
    """Runs `stock` and `call` alternately, `pairs` times."""
    spent: list[float] = []
    stock_spent: list[float] = []
    for _ in range(pairs):
        if stock is not None:
            stock_spent.append(seconds(stock, timer))
        spent.append(seconds(call, timer))
    return Pairs(tuple(spent), tuple(stock_spent))
