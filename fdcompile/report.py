"""Report on the last run and its cost."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property

from fdcompile.config import Config
from fdcompile.graph.program import ProgramSpec, StagedProgram
from fdcompile.passes import enabled_passes
from fdcompile.runtime.compiled_runner import CompiledRunner
from fdcompile.runtime.record import RunRecord
from fdcompile.runtime.runner import ProgramRunner, StageCall

_COUNTED = ("flops", "stock_flops", "stage_calls", "stage_flops", "pass_flops")


@dataclass(frozen=True)
class Report:
    """Report on a run, as returned by `fdcompile.explain`. ``print`` shows it as a table.

    Steps are counted from the first step of the run.

    Attributes:
        num_steps: number of steps in the run.
        key_steps: steps at which the encoder ran.
        forced_key_steps: key steps that were not planned, because the conditioning or the shapes had changed.
        groups: (first step, first step after the group) of each group, in order of execution.
        forecast: the configured forecast; ``"planned"`` for a plan with weights.
        plan_notes: differences between the run and what its plan was made for, in the UNet, the scheduler, the schedule
            or the guidance.
        held: key steps of groups whose features were held although a forecast is configured, by reason.
        encoder_runs: number of runs of the encoder stage.
        decoder_evaluations: number of predictions made by the decoder stage.
        decoder_calls: number of calls of the decoder stage.
        ranks: number of processes that shared the decoding; all other figures are those of this process.
        decoded_at_most: (steps, reason) where a group was not decoded in one call; None if all were.
        stock_calls: number of UNet calls that ran the stock UNet.
        stock_reasons: steps of these calls by reason; None for a call that is not in the schedule.
        controlnet_runs: number of runs of the ControlNets.
        feature_bytes: largest size of the features held for one group, including those of the previous key step that a
            forecast reads.
        compile_seconds: seconds spent on capture, on passes, and, by stage, on compilation and first calls.
        backend_notes: by stage, reasons why a backend did not run it as configured, such as without CUDA graphs.
        programs_held: number of programs in the cache, one for each size and kind of call.
        programs_dropped: number of programs dropped since `optimize` because of ``Config.cache_size_limit``.
    """

    num_steps: int
    key_steps: tuple[int, ...]
    forced_key_steps: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]
    forecast: str
    plan_notes: tuple[str, ...]
    held: dict[str, tuple[int | None, ...]]
    encoder_runs: int
    decoder_evaluations: int
    decoder_calls: int
    ranks: int
    decoded_at_most: tuple[int, str] | None
    stock_calls: int
    stock_reasons: dict[str, tuple[int | None, ...]]
    controlnet_runs: int
    feature_bytes: int
    compile_seconds: dict[str, float]
    backend_notes: dict[str, tuple[str, ...]]
    programs_held: int
    programs_dropped: int
    _runners: tuple[ProgramRunner, ...] = field(repr=False)
    _calls: tuple[tuple[ProgramRunner, StageCall, int], ...] = field(repr=False)
    _answered: tuple[tuple[ProgramRunner, int, int], ...] = field(repr=False)

    @classmethod
    def of(cls, run: RunRecord) -> Report:
        runners = tuple(run.runner_cache.runners.values())
        seconds: Counter[str] = Counter()
        for runner in runners:
            seconds.update(runner.compile_seconds)
        return cls(
            num_steps=run.num_steps,
            key_steps=tuple(sorted({start - run.start for start, _ in run.groups})),
            forced_key_steps=tuple(step - run.start for step in run.forced),
            groups=tuple((start - run.start, stop - run.start) for start, stop in run.groups),
            forecast=_forecast_of(runners[0].config) if runners else "hold",
            plan_notes=run.plan_notes,
            held=_by_reason(run.held, run.start),
            encoder_runs=len(run.groups),
            decoder_evaluations=run.decoder_evaluations,
            decoder_calls=run.decoder_calls,
            ranks=run.ranks,
            decoded_at_most=run.decoded_at_most,
            stock_calls=run.stock_calls.total(),
            stock_reasons=_by_reason(run.stock_calls.elements(), run.start),
            controlnet_runs=run.controlnet_runs,
            feature_bytes=run.feature_bytes,
            compile_seconds=dict(seconds),
            backend_notes={name: notes for runner in runners for name, notes in runner.notes.items()},
            programs_held=len(runners),
            programs_dropped=run.runner_cache.runners.dropped,
            _runners=runners,
            _calls=tuple((runner, call, count) for runner in runners for call, count in runner.calls.items()),
            _answered=tuple((runner, batch, count) for runner in runners for batch, count in runner.answered.items()),
        )

    @property
    def programs(self) -> tuple[ProgramSpec, ...]:
        """All programs in the cache. ``print`` shows their stages."""
        return tuple(runner.program for runner in self._runners)

    @cached_property
    def stage_calls(self) -> dict[str, int]:
        """Number of calls of each stage."""
        total: Counter[str] = Counter()
        for _, (stage, _, _), count in self._calls:
            total[stage] += count
        return dict(total)

    @cached_property
    def stage_flops(self) -> dict[str, int]:
        """FLOPs by stage."""
        total: Counter[str] = Counter()
        for runner, call, count in self._calls:
            total[call[0]] += count * runner.flops(call)
        return dict(total)

    @property
    def flops(self) -> int:
        """FLOPs of the UNet."""
        return sum(self.stage_flops.values())

    @cached_property
    def stock_flops(self) -> int:
        """FLOPs of the stock UNet for the same calls."""
        return sum(count * runner.stock_flops(batch) for runner, batch, count in self._answered)

    @cached_property
    def pass_flops(self) -> dict[str, int]:
        """FLOPs saved by each enabled optional pass: the cost of the same run without the pass, minus the actual cost.

        Empty for a loaded package, which has no captured graph to run the other passes on.
        """
        saved: Counter[str] = Counter()
        for runner in self._runners:
            calls = [(call, count) for owner, call, count in self._calls if owner is runner]
            if not calls or not isinstance(runner, CompiledRunner):
                continue
            cost = _cost(runner.program, calls)
            for name in [each.name for each in enabled_passes(runner.config.disabled_passes) if each.optional]:
                saved[name] += _cost(runner.program_without(name), calls) - cost
        return dict(saved)

    def to_json(self) -> str:
        """The attributes and FLOPs as a JSON object."""
        values = {column.name: getattr(self, column.name) for column in fields(self) if not column.name.startswith("_")}
        counted = {name: getattr(self, name) for name in _COUNTED}
        return json.dumps(values | counted, indent=1)

    def _work(self) -> list[tuple[str, str]]:
        """Rows of FLOPs of the calls that the stages answered."""
        if not self.stock_flops:
            return [("GFLOP", "not counted: the stock UNet ran")]
        others = f", without {self.stock_calls} calls that the stock UNet answered" if self.stock_calls else ""
        share = f" ({self.flops / self.stock_flops:.3f} of stock)"
        return [
            ("GFLOP stock", f"{self.stock_flops / 1e9:.2f}{others}"),
            ("GFLOP optimized", f"{self.flops / 1e9:.2f}{share}"),
        ]

    def __str__(self) -> str:
        stage_seconds = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.compile_seconds.items())
        stage_flops = ", ".join(f"{name} {flops / 1e9:.2f}" for name, flops in self.stage_flops.items())
        pass_flops = ", ".join(f"{name} {flops / 1e9:.2f}" for name, flops in self.pass_flops.items())
        dropped = f", {self.programs_dropped} dropped to make room" if self.programs_dropped else ""
        by_ranks = f" here, others on {self.ranks - 1} ranks" if self.ranks > 1 else ""
        rows = [
            ("steps", f"{self.num_steps}"),
            ("key steps", " ".join(map(str, self.key_steps))),
            ("  of them forced", " ".join(map(str, self.forced_key_steps)) or "none"),
            ("groups", " ".join(f"{start}-{stop - 1}" for start, stop in self.groups)),
            *(("plan", note) for note in self.plan_notes),
            *([("forecast", self.forecast)] if self.forecast != "hold" else []),
            *(("  held because", f"{reason} (key steps {_ranges(steps)})") for reason, steps in self.held.items()),
            ("encoder runs", f"{self.encoder_runs}"),
            ("decoder", f"{self.decoder_evaluations} evaluations in {self.decoder_calls} calls{by_ranks}"),
            *([("  because", "at most {} at once: {}".format(*self.decoded_at_most))] if self.decoded_at_most else []),
            ("stock UNet calls", f"{self.stock_calls}"),
            *(("  because", f"{reason} (steps {_ranges(steps)})") for reason, steps in self.stock_reasons.items()),
            *([("ControlNet runs", f"{self.controlnet_runs}")] if self.controlnet_runs else []),
            *self._work(),
            *([("  by stage", stage_flops)] if stage_flops else []),
            *([("  saved by pass", pass_flops)] if pass_flops else []),
            ("features held", f"{self.feature_bytes / 2**20:.2f} MiB"),
            ("compile seconds", stage_seconds),
            *((f"  {name}", note) for name, notes in self.backend_notes.items() for note in notes),
            ("programs held", f"{self.programs_held}{dropped}"),
        ]
        return "\n".join(f"{name:<18} {value}" for name, value in rows)


def _by_reason(reasons: Iterable[tuple[int | None, str]], start: int) -> dict[str, tuple[int | None, ...]]:
    """Groups steps, counted from the first step of the run, by reason."""
    steps_of: dict[str, tuple[int | None, ...]] = {}
    for step, reason in reasons:
        steps_of[reason] = (*steps_of.get(reason, ()), None if step is None else step - start)
    return steps_of


def _ranges(steps: Iterable[int | None]) -> str:
    """Formats steps as ranges: ``2-5 9``; ``none`` if no call is in the schedule."""
    texts, ordered = [], sorted({step for step in steps if step is not None})
    for _, run in itertools.groupby(enumerate(ordered), lambda pair: pair[1] - pair[0]):
        first, *rest = [step for _, step in run]
        texts.append(f"{first}-{rest[-1]}" if rest else f"{first}")
    return " ".join(texts) or "none"


def _cost(program: StagedProgram, calls: list[tuple[StageCall, int]]) -> int:
    """FLOPs of `program` for `calls`, without those of stages that it does not have."""
    return sum(
        count * (steps or 1) * program.stages[name].flops(batch)
        for (name, steps, batch), count in calls
        if name in program.stages
    )


def _forecast_of(config: Config) -> str:
    """``"planned"`` if a plan has weights, else the configured forecast."""
    return "planned" if any(plan.weights is not None for plan in config.plans) else config.forecast
