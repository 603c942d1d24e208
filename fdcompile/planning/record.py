"""Record stock runs: what their UNet puts out at each step, as far as fits need it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
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


def record(pipe: Any, calls: Sequence[Call], progress: Callable[[str, float], None]) -> Record:
    """Makes stock runs of `calls`, and keeps no more of them than a matrix and the outputs of one.

    Raises:
        ValueError: the calls differ in their schedule, or there is nothing to plan in it.
    """
    recorded: Record | None = None
    for number, call in enumerate(calls, start=1):
        progress(f"recording stock runs, call {number} of {len(calls)}", 0.0)
        outputs = _Outputs()
        made = make(pipe, call, outputs.see)
        timesteps, steps = tuple(map(float, pipe.scheduler.timesteps.tolist())), outputs.steps
        if recorded is None:
            if len(steps) < 2:
                raise ValueError(f"the calls run {len(steps)} steps: expected at least 2, of which one can be left out")
            sensitivity = step_sensitivity(pipe.scheduler)[steps.start : steps.stop]
            recorded = Record(timesteps, steps, GramMatrix(len(steps)), sensitivity, [])
        elif (timesteps, steps) != (recorded.timesteps, recorded.steps):
            raise ValueError(
                "the calls have different schedules: make a plan for each, and give their configs together"
            )
        for outputs_of_slot in outputs.by_slot:
            recorded.products.add(outputs_of_slot)
        recorded.made.append(made)
    assert recorded is not None
    return recorded


class _Outputs:
    """The UNet's outputs in one call, on their device: little compared with the features inside it."""

    def __init__(self) -> None:
        self._slots: dict[int, dict[int, Tensor]] = defaultdict(dict)

    def see(self, position: Position, output: Tensor) -> Tensor:
        self._slots[position.slot][position.step] = output.clone()
        return output

    @property
    def steps(self) -> range:
        """The steps that the call has run.

        Raises:
            ValueError: they are not consecutive, or not the same for each of the UNet's calls in a step.
        """
        seen = [list(outputs) for outputs in self._slots.values()]
        steps = range(seen[0][0], seen[0][-1] + 1)
        if any(slot != list(steps) for slot in seen):
            raise ValueError(
                f"the UNet is called at steps {seen}: expected one after another, and the same in each call slot"
            )
        return steps

    @property
    def by_slot(self) -> list[Tensor]:
        """Shape ``[steps, ...]`` each."""
        return [torch.stack(list(outputs.values())) for outputs in self._slots.values()]
