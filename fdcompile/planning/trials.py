"""Runs candidates on held-out calls and compares them with stock."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

from fdcompile.backends.eager import EagerBackend
from fdcompile.config import Config
from fdcompile.measure.calls import Call, Output, run_call
from fdcompile.measure.fidelity import Fidelity, compute_fidelity
from fdcompile.measure.variant import fewer_steps
from fdcompile.pipeline.session import Session
from fdcompile.planning.plan import FewerSteps
from fdcompile.report import Report
from fdcompile.runtime.graph_cache import GraphCache
from fdcompile.runtime.runner_cache import CompiledRunnerCache


class Trials:
    """The held-out calls, run stock and with other configurations.

    Attributes:
        stock: outputs of the stock runs.
        sampler: class name of the scheduler.
    """

    def __init__(self, pipe: Any, calls: Sequence[Call], converged: Sequence[Output] | None) -> None:
        self._pipe, self._calls, self._converged = pipe, calls, converged
        self._steps = [steps_of(pipe, call) for call in calls]
        self.sampler = type(pipe.scheduler).__name__
        self.stock = [run_call(pipe, call) for call in calls]
        self._baselines: dict[int, FewerSteps] = {}
        self._graph_cache = GraphCache(pipe.unet)
        self._runner_caches: dict[tuple[object, ...], CompiledRunnerCache] = {}

    def under(self, scheduler: Any) -> Trials:
        """Returns trials of the same calls with another scheduler. Converged runs and graphs are shared."""
        pipe = copy.copy(self._pipe)
        pipe.scheduler = scheduler
        other = Trials(pipe, self._calls, self._converged)
        other._graph_cache, other._runner_caches = self._graph_cache, self._runner_caches
        return other

    def run(self, config: Config) -> tuple[Report, Fidelity]:
        """Runs the calls with `config`, and returns the report of the last run and the fidelity of all.

        Raises:
            ValueError: the stock UNet ran at some step.
        """
        runner_cache = CompiledRunnerCache(self._graph_cache, config, lambda device: EagerBackend())
        if (alike := self._runner_caches.get(config.program)) is not None:
            runner_cache.adopt(alike)
        self._runner_caches[config.program] = runner_cache
        session = Session(self._pipe, config, runner_cache)
        session.attach()
        try:
            made = [run_call(self._pipe, call) for call in self._calls]
        finally:
            session.detach()
        assert session.executor.record is not None
        report = Report.of(session.executor.record)
        if report.stock_calls:
            raise ValueError(f"nothing to plan, because the stock UNet runs: {', '.join(report.stock_reasons)}")
        return report, self.fidelity(made)

    def baseline(self, work: float) -> FewerSteps | None:
        """Runs stock with the fewest steps that take at least `work`, but fewer than all.

        None if the number of steps cannot be chosen.
        """
        counts = [max(1, min(steps - 1, fewer_steps(work, steps))) for steps in self._steps if steps is not None]
        if len(counts) < len(self._calls):
            return None
        steps = counts[0]
        if steps not in self._baselines:
            made = with_steps(self._pipe, self._calls, counts)
            share = sum(output.steps for output in made) / sum(output.steps for output in self.stock)
            self._baselines[steps] = FewerSteps(steps, share, self.fidelity(made))
        return self._baselines[steps]

    def fidelity(self, made: Sequence[Output]) -> Fidelity:
        """Compares outputs of the calls with those of the stock runs."""
        return compute_fidelity(made, self.stock, self._converged)


def with_steps(pipe: Any, calls: Sequence[Call], steps: Sequence[int]) -> list[Output]:
    """Runs `calls` stock with the given numbers of steps."""
    stripped = [{name: call[name] for name in call.keys() - {"timesteps", "sigmas"}} for call in calls]
    return [run_call(pipe, call | {"num_inference_steps": count}) for call, count in zip(stripped, steps, strict=True)]


def steps_of(pipe: Any, call: Call) -> int | None:
    """Returns the number of steps of `call`; None if the number is not an argument of the call."""
    parameter = inspect.signature(pipe.__call__).parameters.get("num_inference_steps")
    if parameter is None or any(call.get(name) is not None for name in ("timesteps", "sigmas")):
        return None
    steps = call.get("num_inference_steps", parameter.default)
    return steps if isinstance(steps, int) else None
