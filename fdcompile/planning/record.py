"""Record stock runs: what their UNet puts out at each step, as far as fits need it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdcompile.forecasting.fit import GramMatrix, Weights
from fdcompile.forecasting.noise_levels import Vector, step_sensitivity
from fdcompile.measure.calls import Call, Output, make
from fdcompile.runtime.clock import Position

HOLD = (1.0, 0.0)
"""Weights of a step that reads the last key step's output alone."""


@dataclass(frozen=True)
class Record:
    """Stock runs of all calls, which have the same schedule.

    Attributes:
        timesteps: of the whole schedule.
        steps: those that the calls run.
        products: of the outputs at `steps`.
        sensitivity: of `steps`, see `step_sensitivity`.
        made: by the calls.
    """

    timesteps: tuple[float, ...]
    steps: range
    products: GramMatrix
    sensitivity: Vector
    made: list[Output]

    def whole(self, key_steps: tuple[int, ...], weights: Weights) -> tuple[tuple[int, ...], Weights]:
        """What is said of `steps` said of the whole schedule; whatever lies before them is never run."""
        start, stop = self.steps.start, self.steps.stop
        lifted = tuple(start + key for key in key_steps)
        around = (HOLD,) * start, (HOLD,) * (len(self.timesteps) - stop)
        return lifted if start == 0 else (0, *lifted), (*around[0], *weights, *around[1])


def record(pipe: Any, calls: Sequence[Call]) -> Record:
    """Makes stock runs of `calls`, and keeps no more of them than a matrix and the outputs of one.

    Raises:
        ValueError: the calls differ in their schedule, or there is nothing to plan in it.
    """
    found: Record | None = None
    for call in calls:
        outputs = _Outputs()
        made = make(pipe, call, outputs.see)
        timesteps, steps = tuple(map(float, pipe.scheduler.timesteps.tolist())), outputs.steps
        if found is None:
            if len(steps) < 2:
                raise ValueError(f"the calls run {len(steps)} steps: expected at least 2, of which one can be left out")
            sensitivity = step_sensitivity(pipe.scheduler)[steps.start : steps.stop]
            found = Record(timesteps, steps, GramMatrix(len(steps)), sensitivity, [])
        elif (timesteps, steps) != (found.timesteps, found.steps):
            raise ValueError(
                "the calls have different schedules: make a plan for each, and give their configs together"
            )
        for lane in outputs.by_lane:
            found.products.add(lane)
        found.made.append(made)
    assert found is not None
    return found


class _Outputs:
    """The UNet's outputs in one call, on their device: little beside the features inside it."""

    def __init__(self) -> None:
        self._lanes: dict[int, dict[int, Tensor]] = defaultdict(dict)

    def see(self, position: Position, output: Tensor) -> Tensor:
        self._lanes[position.slot][position.step] = output.clone()
        return output

    @property
    def steps(self) -> range:
        """The steps that the call has run.

        Raises:
            ValueError: they are not consecutive, or not the same for each of the UNet's calls in a step.
        """
        seen = [list(own) for own in self._lanes.values()]
        steps = range(seen[0][0], seen[0][-1] + 1)
        if any(own != list(steps) for own in seen):
            raise ValueError(f"the UNet is called at steps {seen}: expected one after another, and alike in all lanes")
        return steps

    @property
    def by_lane(self) -> list[Tensor]:
        """Shape ``[steps, ...]`` each."""
        return [torch.stack(list(own.values())) for own in self._lanes.values()]
