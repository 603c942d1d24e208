"""Plan a pipeline: record it, search, try what is worth a look, and keep what nothing cheaper equals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from fdcompile.config import DECODER, PARTIAL_ENCODER, Config, Planned, deep_feature_caching
from fdcompile.forecasting.fit import Weights, fitted, held, linear, weights_at
from fdcompile.forecasting.noise_levels import predictable_levels
from fdcompile.forecasting.schedule import plan_schedule
from fdcompile.forecasting.search import best_key_steps
from fdcompile.key_steps import number_of_key_steps
from fdcompile.measure.calls import Call, Output, split_calls
from fdcompile.measure.fidelity import Fidelity
from fdcompile.pipeline.check import check_pipe
from fdcompile.pipeline.exchange import running_stock
from fdcompile.pipeline.identity import describe_parts
from fdcompile.planning.plan import Plan, Point, SamplerRow
from fdcompile.planning.record import Record, record
from fdcompile.planning.refit import refit
from fdcompile.planning.samplers import compare_sampler, schedulers_of
from fdcompile.planning.trials import Trials, with_steps
from fdcompile.report import Report
from fdcompile.runtime.caller import Guidance
from fdcompile.version import versions

SHARES = (0.18, 0.24, 0.32, 0.4, 0.5, 0.6, 0.7)
"""Numbers of key steps that are tried, as shares of the steps."""

SHARES_OF_CUTS = (0.18, 0.32, 0.5)
"""Those of `SHARES` at which cuts that take more work are tried."""

CONVERGED = 200
"""Steps that samplers are compared against."""

OUTPUT = "output"

Progress = Callable[[str, float], None]
"""Is told what is being done, and which share of all has been done."""


def plan(
    pipe: Any,
    calls: Sequence[str | Call],
    *,
    converged: int | None = None,
    samplers: Sequence[str] = (),
    progress: Progress = lambda what, done: None,
    **common: Any,
) -> Plan:
    """Measures `pipe` under `calls`, and says where to recompute, how to forecast between, and what that costs.

    The outputs of the UNet are recorded along stock runs of one half of the calls. For several numbers of key steps a
    dynamic programme finds those from which the other steps are predicted best: held, on a line, or by weights fitted
    to the record. Those that hold best get weights once more, fitted to the very runs that they lead to. All of these,
    the default, which needs no record, and other cuts with the best of them, are then run on the other half of the
    calls and compared with stock, as is the stock pipeline with fewer steps.

    It takes about 18 times the work of the calls, and as much memory more as one call's outputs at all steps.

    Args:
        pipe: a diffusers pipeline. It is left as it was, also if it is optimised.
        calls: prompts, or keyword arguments of the pipeline for each call: at least two, with one schedule. A call that
            says nothing of its noise (``generator``) has a seed of its own.
        converged: compares with stock runs of so many steps, too, which come on top.
        samplers: compares these with the pipeline's own at the same work, by the distance to `converged`, which is
            `CONVERGED` by default then: names as in ``("DDIM", "DPM-Solver++", "UniPC", "Euler")``, or classes of
            diffusers. It takes another 5 times the work of half of the calls for each.
        progress: see `Progress`.
        common: keyword arguments of every call, such as ``num_inference_steps=20, guidance_scale=5``.

    Raises:
        TypeError, ValueError: `pipe` is not one that `optimize` accepts, or has no schedule, or `calls` are not as
            above. At most one call has been run then.
        CaptureError: the UNet cannot be exported.
    """
    check_pipe(pipe)
    if not hasattr(pipe.scheduler, "set_timesteps"):
        name = type(pipe.scheduler).__name__
        raise TypeError(f"{name} has no set_timesteps: without a schedule there is nothing to plan")
    schedulers = schedulers_of(pipe, samplers)
    fit, held_out = split_calls(pipe, calls, common)
    if schedulers and converged is None:
        converged = CONVERGED
    with running_stock(pipe), _quiet(pipe):
        recorded = record(pipe, fit, progress)
        reference = None if converged is None else with_steps(pipe, held_out, [converged] * len(held_out))
        return _Planner(pipe, fit, recorded, Trials(pipe, held_out, reference), schedulers, progress).plan()


@dataclass(frozen=True)
class _Schedule:
    """Where to recompute and how to forecast between, said of the whole schedule."""

    forecast: str
    key_steps: tuple[int, ...]
    weights: Weights


@dataclass(frozen=True)
class _Trial:
    schedule: _Schedule
    cut: str
    recompute: tuple[str, ...]
    report: Report
    fidelity: Fidelity

    def point(self) -> Point:
        """With its work, which takes a while to count."""
        return Point(
            cut=self.cut,
            recompute=self.recompute,
            forecast=self.schedule.forecast,
            key_steps=self.schedule.key_steps,
            weights=None if self.schedule.forecast in ("held", "auto") else self.schedule.weights,
            work=self.report.flops / self.report.stock_flops,
            encoder_runs=self.report.encoder_runs,
            fidelity=self.fidelity,
        )


class _Planner:
    def __init__(
        self,
        pipe: Any,
        fit: list[Call],
        recorded: Record,
        trials: Trials,
        samplers: Sequence[Any],
        progress: Progress,
    ) -> None:
        self._pipe, self._fit, self._record, self._trials = pipe, fit, recorded, trials
        self._samplers = samplers
        self._cuts = _cuts(len(pipe.unet.up_blocks))
        self._progress = progress
        self._levels, _ = predictable_levels(pipe.scheduler, len(recorded.timesteps))
        counts, of_cuts = self._counts(SHARES), self._counts(SHARES_OF_CUTS)
        self._done = 0
        self._jobs = 5 * len(counts) + sum(len(self._default(count)) for count in counts)
        self._jobs += len(of_cuts) * len(self._cuts)

    def plan(self) -> Plan:
        best: dict[int, _Schedule] = {}
        tried: list[Point] = []
        for count, schedules in self._search(self._counts(SHARES)).items():
            schedules.append(self._refitted(schedules[0]))
            schedules += self._default(count)
            trials = [self._try(schedule, OUTPUT, ()) for schedule in schedules]
            closest = max(trials, key=lambda trial: trial.fidelity.psnr)
            best[count] = closest.schedule
            tried.append(closest.point())
        for cut, recompute in self._cuts.items():
            with suppress(ValueError):  # in this UNet the cut would compute something at every step for nothing
                tried += [self._try(best[count], cut, recompute).point() for count in self._counts(SHARES_OF_CUTS)]
        points, paper = _frontier(tried), self._paper()
        self._progress("running stock with fewer steps", 1.0)
        baselines = [self._trials.baseline(point.work) for point in (*points, paper)]
        made = [*self._record.made, *self._trials.stock]
        samplers = self._compare_samplers(points)
        return Plan(
            made_for=describe_parts(self._pipe),
            made_with=versions(),
            timesteps=self._record.timesteps,
            guidance=_guidance(made),
            fitted=_pictures(self._record.made),
            judged=_pictures(self._trials.stock),
            points=points,
            baselines=tuple(dict.fromkeys(baseline for baseline in baselines if baseline is not None)),
            paper=paper,
            start=self._record.steps.start,
            samplers=samplers,
        )

    def _compare_samplers(self, points: Sequence[Point]) -> tuple[SamplerRow, ...]:
        """The pipeline's own, `points`, which are of that, and others."""
        if not self._samplers:
            return ()
        steps = len(self._record.steps)
        rows = [
            SamplerRow(self._trials.sampler, "planned", steps, steps * point.work, point.fidelity.converged)
            for point in points
            if point.forecast != "auto" and point.fidelity.converged is not None
        ]
        rows += compare_sampler(self._trials)
        for scheduler in self._samplers:
            self._progress(f"comparing samplers, {type(scheduler).__name__}", 1.0)
            rows += compare_sampler(self._trials.under(scheduler))
        return tuple(rows)

    def _counts(self, shares: Sequence[float]) -> list[int]:
        """Numbers of key steps, at least one and fewer than steps."""
        steps = len(self._record.steps)
        return sorted({min(max(1, round(share * steps)), steps - 1) for share in shares})

    def _search(self, counts: list[int]) -> dict[int, list[_Schedule]]:
        """For each number of key steps the best of them with outputs held, on a line, and fitted."""
        products, steps = self._record.products, self._record.steps
        timesteps = np.array(self._record.timesteps)[steps.start : steps.stop]
        schedules: dict[int, list[_Schedule]] = {count: [] for count in counts}
        forecasts = {"held": held(len(steps)), "linear": linear(timesteps), "fitted": fitted(products)}
        for forecast, weigh in forecasts.items():
            costs = [self._record.sensitivity * products.errors(key, weigh(key)) for key in range(len(steps))]
            best = best_key_steps(costs, max(counts))
            for count in counts:
                keys = best[count - 1]
                schedules[count].append(
                    _Schedule(forecast, *self._record.whole(keys, weights_at(keys, weigh, len(steps))))
                )
        return schedules

    def _refitted(self, schedule: _Schedule) -> _Schedule:
        """The same key steps with weights fitted to the run that they lead to."""
        self._tell(f"fitting to runs with {len(schedule.key_steps)} key steps")
        return _Schedule(
            "refitted", schedule.key_steps, refit(self._pipe, self._fit, schedule.key_steps, len(schedule.weights))
        )

    def _default(self, count: int) -> list[_Schedule]:
        """What the default does with `count` key steps, if it takes so few."""
        if self._levels is None or count < number_of_key_steps(0, len(self._record.steps)):
            return []
        start, stop = self._record.steps.start, self._record.steps.stop
        return [_Schedule("auto", *self._record.whole(*plan_schedule(self._levels, start, stop, count)))]

    def _try(self, schedule: _Schedule, cut: str, recompute: tuple[str, ...]) -> _Trial:
        self._tell(f"{cut}, {schedule.forecast}, {len(schedule.key_steps)} key steps")
        if schedule.forecast == "auto":
            work = sum(key in self._record.steps for key in schedule.key_steps) / len(self._record.steps)
            config = Config("auto", recompute, "auto", work, max_parallel_steps=1, backend="eager")
        else:
            planned = Planned(self._record.timesteps, schedule.key_steps, schedule.weights, None)
            config = Config("all", recompute, "hold", plan=planned, max_parallel_steps=1, backend="eager")
        return _Trial(schedule, cut, recompute, *self._trials.run(config))

    def _paper(self) -> Point:
        """Encoder propagation as it is without a plan."""
        report, fidelity = self._trials.run(Config.paper(max_parallel_steps=1, backend="eager"))
        schedule = _Schedule("held", report.key_steps, ())
        return _Trial(schedule, "encoder propagation, paper's keys", DECODER, report, fidelity).point()

    def _tell(self, what: str) -> None:
        self._progress(what, self._done / self._jobs)
        self._done += 1


def _cuts(levels: int) -> dict[str, tuple[str, ...]]:
    """The cuts that are worth a look in a UNet of so many levels, besides reusing the output."""
    caching = {f"deep-feature caching, {n} recomputed": deep_feature_caching(levels, n) for n in range(1, levels)}
    return caching | {"partial encoder propagation": PARTIAL_ENCODER, "encoder propagation": DECODER}


def _frontier(points: Sequence[Point]) -> tuple[Point, ...]:
    """Those that are closer than all that take no more work, the cheapest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.work, -point.fidelity.psnr)):
        if not kept or point.fidelity.psnr > kept[-1].fidelity.psnr:
            kept.append(point)
    return tuple(kept)


def _pictures(made: Sequence[Output]) -> int:
    return sum(len(output.latents) for output in made)


def _guidance(made: Sequence[Output]) -> Guidance | None:
    said = [output.guidance for output in made if output.guidance is not None]
    return (min(low for low, _ in said), max(high for _, high in said)) if said else None


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bars."""
    configured = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if configured is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = configured
