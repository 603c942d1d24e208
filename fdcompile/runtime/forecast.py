"""Key steps and forecast weights of a run, from a plan, the noise levels or the configuration."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fdcompile.config import Config, Planned
from fdcompile.errors import warn_user
from fdcompile.forecasting.fit import Weights
from fdcompile.forecasting.interpolate import interpolate, is_alike
from fdcompile.forecasting.noise_levels import predictable_levels
from fdcompile.forecasting.schedule import choose_key_steps, forecast_weights
from fdcompile.key_steps import few_steps_warning, number_of_key_steps
from fdcompile.runtime.caller import Caller, Guidance


class Forecaster:
    """Chooses the key steps and forecast weights of each run.

    The features of a step are ``(1 - w) * f + w * f_before``, where ``f`` are the features of the last key step and
    ``f_before`` those of the key step before it.

    Attributes:
        damped: whether forecasts of the run are damped (see `damping`).
        plan_notes: differences between the run and what its plan was made for.
    """

    def __init__(self, config: Config, plan_notes: tuple[str, ...] = ()) -> None:
        self._config = config
        self._about_plan = plan_notes
        self._timesteps = torch.empty(0)
        self._start = 0
        self._plan: Planned | None = None
        self._weights: Weights | None = None
        self._on_device = torch.empty(0)
        self._key_steps: tuple[int, ...] = ()
        self._not_forecast: str | None = None
        self._outside: str | None = None
        self._warned: set[str] = set()
        self.damped = False
        self.plan_notes = plan_notes

    def begin_run(self, caller: Caller, timesteps: Tensor, start: int, num_steps: int) -> tuple[int, ...]:
        """Chooses key steps of a run of `num_steps` steps from `start` on, as indices into the schedule `timesteps`.

        Warns once for each reason why a plan or the automatic choice is not followed.

        Raises:
            ValueError: the plan was made for another schedule or guidance, and the configuration is strict.
        """
        self._timesteps, self._start = timesteps, start
        self._plan, self._weights, self._not_forecast, self.damped = None, None, None, False
        self._outside, self.plan_notes = None, self._about_plan
        if self._config.plans:
            schedule = caller.values(timesteps)
            plan = self._config.plan_for(schedule)
            if plan is None and (plan := _interpolated(self._config.plans, schedule)) is not None:
                self._note(f"the plan's key steps and weights are interpolated to {len(schedule)} steps")
            if plan is not None and plan.start <= start:
                self._note(_other_guidance(plan, caller))
                return self._follow(plan, start, start + num_steps)
            self._outside = _outside(self._config.plans, plan, schedule, start)
            self._note(self._outside)
        return self._choose(caller, start, start + num_steps)

    def _note(self, note: str | None) -> None:
        """Records a difference between the run and its plan, and warns of it or, if strict, raises it."""
        if note is None:
            return
        if self._config.strict:
            raise ValueError(f"{note}; the configuration is strict")
        self._warn(note)
        self.plan_notes = (*self.plan_notes, note)

    def _follow(self, plan: Planned, start: int, stop: int) -> tuple[int, ...]:
        self._plan, self._weights = plan, plan.weights
        self._key_steps = (start, *(key for key in plan.key_steps if start < key < stop))
        if plan.weights is not None:
            self._put_on_device(plan.weights)
        return self._key_steps

    def _choose(self, caller: Caller, start: int, stop: int) -> tuple[int, ...]:
        """Key steps and weights without a plan."""
        steps = stop - start
        asked = self._config.key_steps_of(steps)
        levels = None
        if asked is None or self._config.forecast == "auto":
            levels, self._not_forecast = predictable_levels(caller.scheduler, len(self._timesteps), caller.values)
        weights: Weights | None = None
        if asked is None:
            if self._not_forecast is not None:
                self._warn(f"key_steps='auto': {self._not_forecast}, so that every step is a key step")
            else:
                self._not_forecast = few_steps_warning("auto", steps)
            if levels is None or self._not_forecast is not None:
                asked = tuple(range(steps))
            else:
                count, recompute = number_of_key_steps(self._config.work, steps), bool(self._config.recompute)
                asked, weights = choose_key_steps(levels, start, stop, count, recompute=recompute)
        elif levels is not None and self._config.forecast == "auto":
            weights = forecast_weights(levels, start, stop, asked)
        self._key_steps = tuple(start + key for key in asked)
        if weights is not None and self._config.forecast == "auto":
            hold = (1.0, 0.0)
            self._weights = (*(hold,) * start, *weights, *(hold,) * (len(self._timesteps) - stop))
            self._put_on_device(self._weights)
            self.damped = True
        return self._key_steps

    def _put_on_device(self, weights: Weights) -> None:
        before = (0.0 if step in self._key_steps else pair[1] for step, pair in enumerate(weights))
        self._on_device = _on_device(tuple(before), self._timesteps.device)

    def warn_of_few_steps(self, num_steps: int) -> None:
        """Warns once if a preset makes every step a key step because there are few steps."""
        if (message := few_steps_warning(self._config.key_steps, num_steps)) is not None:
            self._warn(message, topic="few steps")

    def _warn(self, message: str, topic: str = "") -> None:
        """Warns once per `topic`, or once per `message` without a topic."""
        topic = topic or message
        if topic not in self._warned:
            self._warned.add(topic)
            warn_user(message)

    def why_held(self, before: int | None, last: int, caller: Caller) -> str | None:
        """Reason why the features of key step `last` are held although a forecast is configured; None if there is none.

        `before` is the key step before it; None if its features are lost, or if `last` is the first key step of the
        run, which is not reported.
        """
        held = self._config.forecast == "hold" if self._plan is None else self._plan.weights is None
        if self._not_forecast is not None or held:
            return self._not_forecast or self._outside
        if self._plan is not None and (other := _other_guidance(self._plan, caller)) is not None:
            return other
        if before is None:
            return None if last == self._start else "the features of the key step before are lost"
        planned = self._key_steps if self._plan is None else self._plan.key_steps
        if self._weights is not None and (before, last) not in itertools.pairwise(planned):
            return "the plan has no weights for these two key steps"
        return None

    def weights(self, before: int, last: int) -> Tensor:
        """Weights of the features of key step `before` at every step after key step `last`, shape ``[timesteps]``.

        Linear weights extrapolate in the timestep, and are 0 if both key steps have the same timestep. Weights of held
        features are 0.
        """
        if self._weights is not None:
            return self._on_device
        if self._config.forecast != "linear":
            return torch.zeros(len(self._timesteps), device=self._timesteps.device)
        elapsed = self._timesteps - self._timesteps[last]
        between = self._timesteps[last] - self._timesteps[before]
        return torch.where(between == 0, 0, -elapsed / between)

    def weight_of_check(self, step: int) -> float:
        """Weight of the features two key steps back in a forecast of key step `step`."""
        return 0.0 if self._weights is None else self._weights[step][1]


def _interpolated(plans: Sequence[Planned], schedule: Sequence[float]) -> Planned | None:
    """Interpolates the plan of the closest number of steps to `schedule`; None if no plan's schedule is similar."""
    alike = [plan for plan in plans if is_alike(plan.timesteps, schedule)]
    if not alike:
        return None
    plan = min(alike, key=lambda plan: abs(len(plan.timesteps) - len(schedule)))
    key_steps, weights = interpolate(plan.timesteps, plan.key_steps, plan.weights, tuple(schedule))
    first = plan.timesteps[plan.start]
    start = min(range(len(schedule)), key=lambda step: abs(schedule[step] - first)) if plan.start else 0
    return replace(plan, timesteps=tuple(schedule), key_steps=key_steps, weights=weights, start=start)


def key_steps_of(config: Config, scheduler: Any, guidance: float | None = None) -> tuple[int, ...]:
    """Key steps of a run of the current schedule of `scheduler`, from the start of its plan on if there is one.

    Raises:
        ValueError: see `Forecaster.begin_run`.
    """
    timesteps = scheduler.timesteps
    plan = config.plan_for(timesteps.tolist())
    start = 0 if plan is None else plan.start
    caller = Caller(SimpleNamespace(scheduler=scheduler, guidance_scale=guidance))
    return Forecaster(config).begin_run(caller, timesteps, start, len(timesteps) - start)


@lru_cache(maxsize=32)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """`values` as a tensor on `device`, cached, because the copy synchronizes with the device."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


def _other_guidance(plan: Planned, caller: Caller) -> str | None:
    """Message if the guidance of `caller` is outside of the range of `plan`'s weights; None if it is inside."""
    if plan.weights is None or plan.guidance is None or (scale := caller.guidance) is None:
        return None
    low, high = plan.guidance
    if low <= scale[0] and scale[1] <= high:
        return None
    return f"guidance {_spell(scale)} is outside of the plan's {_spell(plan.guidance)}"


def _outside(plans: Sequence[Planned], plan: Planned | None, schedule: Sequence[float], start: int) -> str:
    if plan is not None:
        return (
            f"the plan was made for runs from step {plan.start} on, this one starts at step {start}: "
            f"its key steps are those of Config.key_steps"
        )
    planned = ", ".join(_spell_schedule(each.timesteps) for each in plans)
    return (
        f"the plan is for another schedule, so that the key steps are those of Config.key_steps: it is for {planned}, "
        f"this run has {_spell_schedule(schedule)}"
    )


def _spell_schedule(timesteps: Sequence[float]) -> str:
    return f"{len(timesteps)} timesteps from {timesteps[0]:g} to {timesteps[-1]:g}"


def _spell(guidance: Guidance) -> str:
    low, high = guidance
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
