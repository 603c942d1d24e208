"""Fit weights to the runs that they lead to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fdcompile.forecasting.fit import Weights, bounded
from fdcompile.measure.calls import Call, make
from fdcompile.runtime.clock import Position


def refit(pipe: Any, calls: Sequence[Call], key_steps: tuple[int, ...], steps: int) -> Weights:
    """Weights for `key_steps` in a schedule of `steps` steps, which the output reused by them leaves on its path.

    Weights that were fitted to stock runs can lead a run astray. Here the UNet is evaluated at the run's own latents,
    at the steps between key steps too, and each step's weights are fitted before it is taken: to all calls so far, so
    that those of the last call are fitted to all.
    """
    runs = PlannedRuns(frozenset(key_steps), steps)
    for call in calls:
        make(pipe, call, runs.see)
    return runs.weights


class PlannedRuns:
    """Runs with `key_steps` and the output reused, in which it learns how much of the key step before to add."""

    def __init__(self, key_steps: frozenset[int], steps: int) -> None:
        self._key_steps = key_steps
        self._products, self._squares = np.zeros(steps), np.zeros(steps)
        self._last: dict[int, Tensor] = {}
        self._before: dict[int, Tensor] = {}

    @property
    def weights(self) -> Weights:
        """Of each step; ``(1, 0)`` where nothing was fitted."""
        return tuple((1 - weight, weight) for weight in bounded(self._products, self._squares).tolist())

    def see(self, position: Position, output: Tensor) -> Tensor:
        """What the planned run has at `position`, where the UNet says `output`."""
        step, slot = position.step, position.slot
        if step == position.start:
            self._last.pop(slot, None)
        if step == position.start or step in self._key_steps:
            self._before[slot], self._last[slot] = self._last.get(slot, output), output.clone()
            return output
        last, change = self._last[slot], self._before[slot] - self._last[slot]
        wanted, along = (output - last).double().flatten(), change.double().flatten()
        self._products[step] += (wanted @ along).item()
        self._squares[step] += (along @ along).item()
        forecast: Tensor = last + self.weights[step][1] * change
        return forecast
