"""Makes a plan: records stock runs, searches for key steps, measures candidates, keeps the Pareto-optimal ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from fdcompile.config import DECODER, PARTIAL_ENCODER, Config, Planned, deep_feature_caching
from fdcompile.forecasting.fit import Weights, fitted, held, linear, weights_at
from fdcompile.forecasting.noise_levels import predictable_levels
from fdcompile.forecasting.schedule import choose_key_steps
from fdcompile.forecasting.search import best_key_steps
from fdcompile.graph.cut import CutError
from fdcompile.key_steps import few_steps_warning, number_of_key_steps
from fdcompile.measure.calls import Call, Output, split_calls
from fdcompile.measure.fidelity import Fidelity
from fdcompile.pipeline.check import check_pipe
from fdcompile.pipeline.exchange import running_stock
from fdcompile.pipeline.identity import describe_parts
from fdcompile.planning.plan import Plan, Point, SamplerRow
from fdcompile.planning.record import Record, record
from fdcompile.planning.refit import refit
from fdcompile.planning.samplers import compare_sampler, schedulers_of
from fdcompile.planning.trials import Trials, steps_of, with_steps
from fdcompile.report import Report
from fdcompile.runtime.caller import Guidance
from fdcompile.version import versions

SHARES = (0.18, 0.24, 0.32, 0.4, 0.5, 0.6, 0.7)
"""Numbers of key steps to measure, as shares of the steps."""

SHARES_OF_CUTS = (0.18, 0.32, 0.5)
"""Those of `SHARES` at which cuts other than the output are measured."""

CONVERGED = 200
"""Steps of the stock runs that samplers are compared with by default."""

OUTPUT = "output"

Progress = Callable[[str, float], None]
"""Callback with a description of the current stage and the share of the work done."""


def plan(
    pipe: Any,
    calls: Sequence[str | Call],
    *,
    converged: int | None = None,
    samplers: Sequence[str] = (),
    progress: Progress = lambda what, done: None,
    **common: Any,
) -> Plan:
    """Chooses key steps, cuts and forecast weights for `pipe`, and measures their work and fidelity on `calls`.

    Records the outputs of the UNet in stock runs of one half of the calls. For several numbers of key steps, dynamic
    programming finds the key steps from which the other steps are predicted with the least error, for three forecasts:
    held, linear, and with weights fitted to the recording. The best key steps for held outputs also get weights that
    are fitted to the runs they lead to (`refit`). These schedules, the default configuration, and the best schedule
    with other cuts are then run on the other half of the calls and compared with stock and with fewer steps.

    Takes about 18 times the work of the calls, and additional memory for one call's outputs at all steps.

    Args:
        pipe: a diffusers pipeline, stock or optimized; it is left unchanged.
        calls: prompts, or keyword arguments of the pipeline for each call; at least two, all with the same schedule. A
            call without ``generator`` gets its own seed.
        converged: number of steps of additional stock runs to compare with; None for no such comparison.
        samplers: samplers to compare with the pipeline's own at the same work, by their PSNR to the `converged` runs
            (of `CONVERGED` steps by default): names such as ``("DDIM", "DPM-Solver++", "UniPC", "Euler")``, or classes
            of diffusers. Each takes another 5 times the work of half of the calls.
        progress: see `Progress`.
        common: keyword arguments of every call, such as ``num_inference_steps=20, guidance_scale=5``.

    Raises:
        TypeError, ValueError: `optimize` does not accept `pipe`, `pipe` has no schedule, or an argument is invalid. At
            most one call has been run by then.
        CaptureError: the UNet cannot be exported.
    """
    check_pipe(pipe)
    if not hasattr(pipe.scheduler, "set_timesteps"):
        name = type(pipe.scheduler).__name__
        raise TypeError(f"{name} has no set_timesteps: without a schedule there is nothing to plan")
    schedulers = schedulers_of(pipe, samplers)
    fit, held_out = split_calls(pipe, calls, common)
    steps = max(steps_of(pipe, call) or 1 for call in (*fit, *held_out))
    if schedulers and converged is None:
        converged = max(CONVERGED, steps)
    _check_converged(converged, steps)
    quiet = copy.copy(pipe)
    quiet.set_progress_bar_config(disable=True)
    with running_stock(pipe):
        recorded = record(quiet, fit, progress)
        reference = None if converged is None else with_steps(quiet, held_out, [converged] * len(held_out))
        return _Planner(quiet, fit, recorded, Trials(quiet, held_out, reference), progress).plan(schedulers)


def _check_converged(converged: object, steps: int) -> None:
    if converged is None:
        return
    if type(converged) is not int:
        raise TypeError(f"converged={converged!r}: expected a number of steps, or None")
    if converged < steps:
        raise ValueError(f"converged={converged}: expected at least the {steps} steps of the calls")


@dataclass(frozen=True)
class _Schedule:
    """Key steps and forecast weights of the whole schedule."""

    forecast: str
    key_steps: tuple[int, ...]
    weights: Weights


def _point(cut: str, recompute: tuple[str, ...], schedule: _Schedule, report: Report, fidelity: Fidelity) -> Point:
    """Describes a trial; counts the FLOPs, which takes a while."""
    return Point(
        cut=cut,
        recompute=recompute,
        forecast=schedule.forecast,
        key_steps=schedule.key_steps,
        weights=None if schedule.forecast in ("held", "auto") else schedule.weights,
        work=report.flops / report.stock_flops,
        encoder_runs=report.encoder_runs,
        fidelity=fidelity,
    )


class _Planner:
    def __init__(self, pipe: Any, fit: list[Call], recorded: Record, trials: Trials, progress: Progress) -> None:
        self._pipe, self._fit, self._record, self._trials, self._progress = pipe, fit, recorded, trials, progress
        self._levels, _ = predictable_levels(pipe.scheduler, len(recorded.timesteps))
        self._done = self._jobs = 0

    def plan(self, samplers: Sequence[Any]) -> Plan:
        counts, of_cuts = self._counts(SHARES), self._counts(SHARES_OF_CUTS)
        cuts = _cuts(len(self._pipe.unet.up_blocks))
        defaults = {count: self._default(count) for count in counts}
        of_features = {count: self._default(count, recompute=True) for count in of_cuts}
        self._jobs = 5 * len(counts) + sum(map(len, defaults.values())) + len(of_cuts) * len(cuts)
        best: dict[int, _Schedule] = {}
        tried: list[Point] = []
        for count, schedules in self._search(counts).items():
            refitted = self._refitted(schedules[0])
            trials = [self._try(schedule, OUTPUT, ()) for schedule in (*schedules, refitted, *defaults[count])]
            best[count], report, fidelity = max(trials, key=lambda trial: trial[-1].psnr)
            tried.append(_point(OUTPUT, (), best[count], report, fidelity))
        for cut, recompute in cuts.items():
            with suppress(CutError):  # it does not fit this UNet
                for count in of_cuts:
                    schedule = of_features[count][0] if best[count].forecast == "auto" else best[count]
                    tried.append(_point(cut, recompute, *self._try(schedule, cut, recompute)))
        points, paper = _frontier(tried), self._paper()
        self._progress("running stock with fewer steps", 1.0)
        baselines = [self._trials.baseline(point.work) for point in (*points, paper)]
        made = [*self._record.made, *self._trials.stock]
        return Plan(
            made_for=describe_parts(self._pipe),
            made_with=versions(),
            timesteps=self._record.timesteps,
            guidance=_guidance(made),
            fitted=_images(self._record.made),
            judged=_images(self._trials.stock),
            points=points,
            baselines=tuple(dict.fromkeys(baseline for baseline in baselines if baseline is not None)),
            paper=paper,
            start=self._record.steps.start,
            samplers=self._compare_samplers(points, samplers),
        )

    def _compare_samplers(self, points: Sequence[Point], samplers: Sequence[Any]) -> tuple[SamplerRow, ...]:
        """Compares the pipeline's own sampler, with `points` as its planned rows, with the other samplers."""
        if not samplers:
            return ()
        steps = len(self._record.steps)
        rows = [
            SamplerRow(self._trials.sampler, "planned", steps, steps * point.work, point.fidelity.converged)
            for point in points
            if point.forecast != "auto" and point.fidelity.converged is not None
        ]
        rows += compare_sampler(self._trials)
        for scheduler in samplers:
            self._progress(f"comparing samplers, {type(scheduler).__name__}", 1.0)
            rows += compare_sampler(self._trials.under(scheduler))
        return tuple(rows)

    def _counts(self, shares: Sequence[float]) -> list[int]:
        """Converts shares to numbers of key steps, from 1 to the number of steps - 1."""
        steps = len(self._record.steps)
        return sorted({min(max(1, round(share * steps)), steps - 1) for share in shares})

    def _search(self, counts: list[int]) -> dict[int, list[_Schedule]]:
        """Returns, for each number of key steps, the best schedules with held, linear and fitted forecasts."""
        products, steps = self._record.products, self._record.steps
        timesteps = np.array(self._record.timesteps)[steps.start : steps.stop]
        schedules: dict[int, list[_Schedule]] = {count: [] for count in counts}
        forecasts = {"held": held(len(steps)), "linear": linear(timesteps), "fitted": fitted(products)}
        for forecast, weigh in forecasts.items():
            costs = [self._record.sensitivity * products.errors(key, weigh(key)) for key in range(len(steps))]
            best = best_key_steps(costs, max(counts))
            for count in counts:
                keys = best[count - 1]
                weights = weights_at(keys, weigh, len(steps))
                schedules[count].append(_Schedule(forecast, *self._record.whole(keys, weights)))
        return schedules

    def _refitted(self, schedule: _Schedule) -> _Schedule:
        """Returns the same key steps with weights fitted to the runs they lead to."""
        keys = schedule.key_steps
        self._tell(f"fitting to runs with {len(keys)} key steps")
        return _Schedule("refitted", keys, refit(self._pipe, self._fit, keys, len(schedule.weights)))

    def _default(self, count: int, *, recompute: bool = False) -> list[_Schedule]:
        """Returns the schedule of ``key_steps="auto"``; empty if it does not apply to so few key steps."""
        steps = self._record.steps
        few = few_steps_warning("auto", len(steps)) is not None
        if self._levels is None or few or count < number_of_key_steps(0, len(steps)):
            return []
        chosen = choose_key_steps(self._levels, steps.start, steps.stop, count, recompute=recompute)
        return [_Schedule("auto", *self._record.whole(*chosen))]

    def _try(self, schedule: _Schedule, cut: str, recompute: tuple[str, ...]) -> tuple[_Schedule, Report, Fidelity]:
        self._tell(f"{cut}, {schedule.forecast}, {len(schedule.key_steps)} key steps")
        if schedule.forecast == "auto":
            work = sum(key in self._record.steps for key in schedule.key_steps) / len(self._record.steps)
            config = Config("auto", recompute, "auto", work, max_parallel_steps=1, backend="eager")
        else:
            planned = Planned(self._record.timesteps, schedule.key_steps, schedule.weights, None)
            config = Config("all", recompute, "hold", plan=planned, max_parallel_steps=1, backend="eager")
        return schedule, *self._trials.run(config)

    def _paper(self) -> Point:
        """Measures encoder propagation at the paper's key steps."""
        report, fidelity = self._trials.run(Config.paper(max_parallel_steps=1, backend="eager"))
        schedule = _Schedule("held", report.key_steps, ())
        return _point("encoder propagation, paper's keys", DECODER, schedule, report, fidelity)

    def _tell(self, what: str) -> None:
        self._progress(what, self._done / self._jobs)
        self._done += 1


def _cuts(levels: int) -> dict[str, tuple[str, ...]]:
    """Returns the cuts to measure in a UNet of `levels` levels, by name, apart from reusing the output."""
    caching = {f"deep-feature caching, {n} recomputed": deep_feature_caching(levels, n) for n in range(1, levels)}
    return caching | {"partial encoder propagation": PARTIAL_ENCODER, "encoder propagation": DECODER}


def _frontier(points: Sequence[Point]) -> tuple[Point, ...]:
    """Returns the Pareto-optimal points in work and PSNR, the cheapest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.work, -point.fidelity.psnr)):
        if not kept or point.fidelity.psnr > kept[-1].fidelity.psnr:
            kept.append(point)
    return tuple(kept)


def _images(made: Sequence[Output]) -> int:
    return sum(len(output.latents) for output in made)


def _guidance(made: Sequence[Output]) -> Guidance | None:
    said = [output.guidance for output in made if output.guidance is not None]
    return (min(low for low, _ in said), max(high for _, high in said)) if said else None
