"""Records stock runs: inner products of the UNet's outputs at all steps, which the fits need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdcompile.forecasting.fit import GramMatrix, Weights
from fdcompile.forecasting.noise_levels import Vector, step_sensitivity
from fdcompile.measure.calls import Call, Output, run_call
from fdcompile.runtime.clock import Position

HOLD = (1.0, 0.0)
"""Forecast weights of a step that reuses the last key step's output."""


@dataclass(frozen=True)
class Record:
    """A recording of stock runs of all calls, which have the same schedule.

    Attributes:
        timesteps: timesteps of the whole schedule.
        steps: steps that the calls run.
        products: inner products of the outputs at `steps`.
        sensitivity: weight of the error at each of `steps`, shape ``[steps]``; see `step_sensitivity`.
        made: outputs of the calls.
    """

    timesteps: tuple[float, ...]
    steps: range
    products: GramMatrix
    sensitivity: Vector
    made: list[Output]

    def whole(self, key_steps: tuple[int, ...], weights: Weights) -> tuple[tuple[int, ...], Weights]:
        """Extends key steps and weights of `steps` to the whole schedule; steps outside of `steps` are never run."""
        start, stop = self.steps.start, self.steps.stop
        lifted = tuple(start + key for key in key_steps)
        around = (HOLD,) * start, (HOLD,) * (len(self.timesteps) - stop)
        return lifted if start == 0 else (0, *lifted), (*around[0], *weights, *around[1])


def record(pipe: Any, calls: Sequence[Call], progress: Callable[[str, float], None]) -> Record:
    """Records stock runs of `calls`. Memory holds a matrix and the UNet's outputs of one call at a time.

    Raises:
        ValueError: the calls have different schedules, or run fewer than two steps.
    """
    recorded: Record | None = None
    for number, call in enumerate(calls, start=1):
        progress(f"recording stock runs, call {number} of {len(calls)}", 0.0)
        outputs = _Outputs()
        made = run_call(pipe, call, outputs.output_hook)
        timesteps, steps = tuple(map(float, pipe.scheduler.timesteps.tolist())), outputs.steps
        if recorded is None:
            if len(steps) < 2:
                raise ValueError(f"the calls run {len(steps)} steps: expected at least 2, of which one can be left out")
            sensitivity = step_sensitivity(pipe.scheduler)[steps.start : steps.stop]
            recorded = Record(timesteps, steps, GramMatrix(len(steps)), sensitivity, [])
        elif (timesteps, steps) != (recorded.timesteps, recorded.steps):
            raise ValueError(
                "the calls have different schedules: make a plan for each, and pass their configs together"
            )
        for outputs_of_slot in outputs.by_slot:
            recorded.products.add(outputs_of_slot)
        recorded.made.append(made)
    assert recorded is not None
    return recorded


class _Outputs:
    """The UNet's outputs in one call, on their device: small compared with the features inside the UNet."""

    def __init__(self) -> None:
        self._slots: dict[int, dict[int, Tensor]] = defaultdict(dict)

    def output_hook(self, position: Position, output: Tensor) -> Tensor:
        self._slots[position.slot][position.step] = output.clone()
        return output

    @property
    def steps(self) -> range:
        """Steps that the call has run.

        Raises:
            ValueError: the steps are not consecutive, or differ between call slots.
        """
        seen = [list(outputs) for outputs in self._slots.values()]
        steps = range(seen[0][0], seen[0][-1] + 1)
        if any(slot != list(steps) for slot in seen):
            raise ValueError(
                f"the UNet is called at steps {seen}: expected consecutive steps, the same in each call slot"
            )
        return steps

    @property
    def by_slot(self) -> list[Tensor]:
        """Outputs of each call slot, shape ``[steps, ...]``."""
        return [torch.stack(list(outputs.values())) for outputs in self._slots.values()]
