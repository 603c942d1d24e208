"""What a run makes of its plan: where its key steps are, and how much of the one before goes into each step."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fdcompile.config import Config, Planned
from fdcompile.runtime.caller import Caller, Guidance


class Forecast:
    """Follows `config` from run to run.

    A step's features are ``(1 - w) * f + w * f_before``: `f` are those of the last key step, `f_before` those of the
    one before.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._timesteps = torch.empty(0)
        self._start = 0
        self._plan: Planned | None = None
        self._planned = torch.empty(0)
        self._missing: str | None = None
        self._warned: set[str] = set()

    def begin_run(self, timesteps: Tensor, start: int, num_steps: int) -> tuple[int, ...]:
        """Key steps of a run of `num_steps` steps from `start` on, as indices into the schedule `timesteps`.

        A schedule that is not planned is warned of once.
        """
        # Reading timesteps waits for the device.
        schedule: Sequence[float] = timesteps.tolist() if self._config.plans else range(len(timesteps))
        self._timesteps, self._start = timesteps, start
        self._plan = self._config.plan_for(schedule)
        self._missing = _missing(self._config.plans, schedule) if self._config.plans and self._plan is None else None
        if self._missing is not None and self._missing not in self._warned:
            self._warned.add(self._missing)
            warnings.warn(self._missing, stacklevel=2)
        if self._plan is not None and self._plan.weights is not None:
            self._planned = torch.tensor([before for _, before in self._plan.weights], device=timesteps.device)
        return self._config.key_steps_of(schedule, start, start + num_steps)

    def why_held(self, before: int | None, last: int, caller: Caller) -> str | None:
        """Why the steps after key step `last` read its features as they are, where a forecast was asked for.

        `before` is the key step before, None if its features are lost or it is the run's first, which is no reason.
        """
        if self._missing is not None or not self._config.forecasts:
            return self._missing
        if self._plan is not None and self._plan.guidance is not None and (guidance := caller.guidance) is not None:
            low, high = self._plan.guidance
            if guidance[0] < low or guidance[1] > high:
                return f"guidance {_spell(guidance)} is outside of the plan's {_spell(self._plan.guidance)}"
        if before is None:
            return None if last == self._start else "the features of the key step before are lost"
        if self._config.forecast == "planned":
            assert self._plan is not None
            if (before, last) not in itertools.pairwise(self._plan.key_steps):
                return "the plan has no weights for these two key steps"
        return None

    def weights(self, before: int, last: int) -> Tensor:
        """Of the features at key step `before` in every step after key step `last`: shape ``[timesteps]``.

        Linear ones extrapolate in the timestep, and hold where both key steps have the same one.
        """
        if self._config.forecast == "planned":
            return self._planned
        elapsed = self._timesteps - self._timesteps[last]
        between = self._timesteps[last] - self._timesteps[before]
        return torch.where(between == 0, 0, -elapsed / between)


def _missing(plans: Sequence[Planned], schedule: Sequence[float]) -> str:
    planned = ", ".join(_spell_schedule(plan.timesteps) for plan in plans)
    return (
        f"the plan is for another schedule, so that every step is a key step: it is for {planned}, "
        f"this run has {_spell_schedule(schedule)}"
    )


def _spell_schedule(timesteps: Sequence[float]) -> str:
    return f"{len(timesteps)} timesteps from {timesteps[0]:g} to {timesteps[-1]:g}"


def _spell(guidance: Guidance) -> str:
    low, high = guidance
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
