"""Fits forecast weights to the runs they lead to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fdcompile.forecasting.fit import Weights, bounded
from fdcompile.measure.calls import Call, run_call
from fdcompile.runtime.clock import Position


def refit(pipe: Any, calls: Sequence[Call], key_steps: tuple[int, ...], steps: int) -> Weights:
    """Fits the weights of `key_steps` in a schedule of `steps` steps, with the output reused, on the planned runs.

    Weights that were fitted to stock runs can let a planned run drift, since its latents differ from stock's. Here the
    UNet is evaluated at the run's own latents at every step, also between key steps. The weights of a step are fitted
    to all calls so far, before the step is taken; so after the last call they are fitted to all calls.
    """
    runs = PlannedRuns(frozenset(key_steps), steps)
    for call in calls:
        run_call(pipe, call, runs.output_hook)
    return runs.weights


class PlannedRuns:
    """Runs with `key_steps` and the output reused that fit the weight of the previous key step at each step."""

    def __init__(self, key_steps: frozenset[int], steps: int) -> None:
        self._key_steps = key_steps
        self._products, self._squares = np.zeros(steps), np.zeros(steps)
        self._last: dict[int, Tensor] = {}
        self._before: dict[int, Tensor] = {}

    @property
    def weights(self) -> Weights:
        """Weights of each step; ``(1, 0)`` if nothing was fitted."""
        return tuple((1 - weight, weight) for weight in bounded(self._products, self._squares).tolist())

    def output_hook(self, position: Position, output: Tensor) -> Tensor:
        """Returns the planned run's prediction at `position`, given the UNet's `output` there."""
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
