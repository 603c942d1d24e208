"""A plan: measured points of work and fidelity, and the configurations that reach them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fdcompile.config import Config, Forecast, Planned
from fdcompile.errors import warn_user
from fdcompile.forecasting.fit import Weights
from fdcompile.io import write_json
from fdcompile.measure.fidelity import Fidelity
from fdcompile.measure.plot import Plot, Series, plot_work
from fdcompile.pipeline.identity import digests_of

SCHEMA = 1

_COLUMNS = "work", "encoder runs", "cut", "forecast", "PSNR", "latents", "SSIM", "converged", "fewer steps", "closer by"


@dataclass(frozen=True)
class Point:
    """A measured way to run the UNet.

    Attributes:
        cut: name of the cut.
        recompute: modules that the cut computes at every step.
        forecast: ``"held"``, ``"linear"``, ``"fitted"`` (to stock runs), ``"refitted"`` (to the planned runs), or
            ``"auto"`` for the forecast of the default configuration, which works with any schedule and guidance.
        key_steps: indices into the schedule.
        weights: forecast weights of each step; None with ``"held"`` and ``"auto"``.
        work: FLOPs of the UNet as a share of stock's.
        encoder_runs: number of encoder runs in a run of the sampler.
        fidelity: closeness to the stock runs.
    """

    cut: str
    recompute: tuple[str, ...]
    forecast: str
    key_steps: tuple[int, ...]
    weights: Weights | None
    work: float
    encoder_runs: int
    fidelity: Fidelity

    def __str__(self) -> str:
        return f"{self.cut}, {self.forecast}: {self.work:.3f} of the work, {self.fidelity.psnr:.1f} dB"


@dataclass(frozen=True)
class FewerSteps:
    """The fewer-steps baseline: the stock pipeline with fewer steps.

    Attributes:
        steps: sampling steps.
        work: UNet calls as a share of those with all steps.
        fidelity: closeness to the stock runs with all steps.
    """

    steps: int
    work: float
    fidelity: Fidelity

    def __str__(self) -> str:
        return f"stock with {self.steps} steps: {self.work:.3f} of the work, {self.fidelity.psnr:.1f} dB"


@dataclass(frozen=True)
class SamplerRow:
    """Result of one sampler on the held-out calls of a plan.

    Attributes:
        sampler: class of the scheduler.
        method: ``"stock"``, ``"default"`` or ``"planned"``.
        steps: sampling steps.
        unet_runs: FLOPs of the UNet for each image, as a multiple of the FLOPs of one stock call.
        converged: PSNR in dB to the stock run with many steps.
    """

    sampler: str
    method: str
    steps: int
    unet_runs: float
    converged: float

    def __str__(self) -> str:
        return f"{self.sampler}, {self.method}, {self.steps} steps ({self.converged:.1f} dB)"


@dataclass(frozen=True)
class Plan:
    """Key steps, cuts and forecast weights for one model, one schedule and one kind of calls.

    Holds the Pareto-optimal points of all that were measured. ``print(plan)`` prints them as a table.

    Attributes:
        made_for: digests of the UNet and of the scheduler.
        made_with: versions of fdcompile, torch and diffusers.
        timesteps: timesteps of the whole schedule.
        guidance: smallest and largest guidance scale of the calls; None if the pipeline has no guidance scale.
        fitted: number of images that the weights were fitted to.
        judged: number of held-out images that `Fidelity` was measured on.
        points: Pareto-optimal points, the cheapest first.
        baselines: for each point the stock pipeline with the fewest steps that take at least its work. Empty if the
            number of steps cannot be chosen.
        paper: encoder propagation at the paper's key steps.
        start: first step that the calls ran.
        samplers: comparison with other samplers; empty unless requested.
    """

    made_for: dict[str, dict[str, str]]
    made_with: dict[str, str]
    timesteps: tuple[float, ...]
    guidance: tuple[float, float] | None
    fitted: int
    judged: int
    points: tuple[Point, ...]
    baselines: tuple[FewerSteps, ...]
    paper: Point
    start: int = 0
    samplers: tuple[SamplerRow, ...] = ()

    def config(self, *, work: float | None = None, psnr: float | None = None) -> Config:
        """Returns the configuration of a `point`, for `fdcompile.optimize`.

        Warns if the stock pipeline with fewer steps is as close at the same work.

        Raises:
            ValueError, TypeError: see `point`.
        """
        point = self.point(work=work, psnr=psnr)
        if self.gain(point) <= 0:
            warn_user(f"{point}: {self.baseline(point)} is as close")
        return self.configured(point)

    def point(self, *, work: float | None = None, psnr: float | None = None) -> Point:
        """Returns the closest point within `work`, or the cheapest one that reaches `psnr`.

        Args:
            work: largest share of the stock UNet's FLOPs.
            psnr: smallest PSNR to the stock images, in dB.

        Raises:
            ValueError: no point meets the condition; the message names the nearest one.
            TypeError: neither or both arguments are given.
        """
        if (work is None) == (psnr is None):
            raise TypeError(f"work={work}, psnr={psnr}: expected exactly one of the two")
        if work is not None:
            within = [point for point in reversed(self.points) if point.work <= work]
            asked, nearest = f"work={work}", self.points[0]
        else:
            within = [point for point in self.points if psnr is not None and point.fidelity.psnr >= psnr]
            asked, nearest = f"psnr={psnr}", self.points[-1]
        if not within:
            raise ValueError(f"{asked}: no measured point meets this, the nearest is {nearest}")
        return within[0]

    def best(self) -> Config:
        """Returns the configuration of the recommended point, as used by ``fdcompile.optimize(pipe, plan)``.

        Raises:
            ValueError: no point is closer than the stock pipeline with fewer steps at the same work.
        """
        if (point := self.recommended()) is None:
            raise ValueError(f"fewer steps are as good everywhere: {self.baseline(self.points[0])}, for example")
        return self.configured(point)

    def recommended(self) -> Point | None:
        """Returns the point with the largest product of gain over fewer steps, in dB, and share of the work saved.

        None if no point gains anything.
        """
        point = max(self.points, key=lambda point: self.gain(point) * (1 - point.work))
        return point if self.gain(point) > 0 else None

    def configured(self, point: Point) -> Config:
        """Returns the configuration of one of `points`."""
        work = point.encoder_runs / (len(self.timesteps) - self.start)
        if point.forecast == "auto":
            return Config("auto", point.recompute, "auto", work)
        planned = Planned(
            self.timesteps, point.key_steps, point.weights, self.guidance, self.start, digests_of(self.made_for)
        )
        forecast: Forecast = "hold" if point.weights is None else "auto"
        return Config("auto", point.recompute, forecast, work, planned)

    def baseline(self, point: Point) -> FewerSteps | None:
        """Returns the cheapest baseline with at least the work of `point`, or else the one with the most steps."""
        by_work = sorted(self.baselines, key=lambda baseline: baseline.work)
        return next((baseline for baseline in by_work if baseline.work >= point.work), by_work[-1] if by_work else None)

    def gain(self, point: Point) -> float:
        """Returns the PSNR of `point` minus that of its fewer-steps baseline in dB; without a baseline the PSNR."""
        baseline = self.baseline(point)
        return point.fidelity.psnr - (baseline.fidelity.psnr if baseline is not None else 0.0)

    def save(self, path: str | Path) -> None:
        """Writes JSON, atomically."""
        write_json(Path(path), {"schema": SCHEMA} | asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a file written by `save`.

        Raises:
            ValueError: the file is not a plan, or has another schema.
            FileNotFoundError: the file does not exist.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            values = _tuples(json.loads(text))
            if values.pop("schema") != SCHEMA:
                raise ValueError(f"expected schema {SCHEMA}")
            for measured in (*values["points"], *values["baselines"], values["paper"]):
                measured["fidelity"] = Fidelity(**measured["fidelity"])
            values["points"] = tuple(Point(**point) for point in values["points"])
            values["baselines"] = tuple(FewerSteps(**baseline) for baseline in values["baselines"])
            values["samplers"] = tuple(SamplerRow(**row) for row in values.get("samplers", ()))
            plan = cls(**values | {"paper": Point(**values["paper"])})
            if not plan.points:
                raise ValueError("expected at least one point")
            for point in plan.points:
                plan.configured(point)  # validates schedule, key steps and weights
            str(plan)  # validates figures and digests
            return plan
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no plan of this version of fdcompile: {error}") from error

    def plot(self, path: str | Path) -> None:
        """Writes `drawing` to a PNG file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        self.drawing().save(Path(path))

    def drawing(self) -> Plot:
        """Plots work against PSNR of the points, the fewer-steps baselines and the paper's key steps.

        The recommended point is marked.

        Raises:
            ImportError: matplotlib is not installed.
        """
        best, paper = self.recommended(), self.paper
        fewer = sorted((baseline.work, baseline.fidelity.psnr) for baseline in self.baselines)
        series = [
            Series("planned", [(point.work, point.fidelity.psnr) for point in self.points], "o-"),
            Series("stock, fewer steps", fewer, "s--", is_baseline=True),
            Series("encoder propagation, the paper's key steps", [(paper.work, paper.fidelity.psnr)], "^"),
        ]
        return plot_work(series, None if best is None else ("recommended", best.work, best.fidelity.psnr))

    def rows(self) -> list[tuple[str, ...]]:
        """Returns column names, then a row for each point and for the paper's key steps. Empty columns are omitted."""
        rows = [_COLUMNS, *map(self._row, (*self.points, self.paper))]
        columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
        return list(zip(*columns, strict=True))

    def _row(self, point: Point) -> tuple[str, ...]:
        fidelity, baseline = point.fidelity, self.baseline(point)
        fewer = ("", "")
        if baseline is not None:
            fewer = f"{baseline.steps}: {baseline.fidelity.psnr:.1f}", f"{self.gain(point):+.1f}"
        return (
            f"{point.work:.3f}",
            f"{point.encoder_runs}",
            point.cut,
            point.forecast,
            f"{fidelity.psnr:.1f}",
            f"{fidelity.latent_psnr:.1f}",
            "" if fidelity.ssim is None else f"{fidelity.ssim:.3f}",
            "" if fidelity.converged is None else f"{fidelity.converged:.1f}",
            *fewer,
        )

    def verdict(self) -> str:
        """Compares all points and the paper's key steps with fewer steps at the same work, in one or two sentences."""
        if not self.baselines:
            return "There is no fewer-steps baseline: the number of steps of this pipeline cannot be chosen."
        behind = [point for point in self.points if self.gain(point) <= 0]
        if not behind:
            planned = "All planned points are closer than the stock pipeline with fewer steps at the same work."
        elif len(behind) == len(self.points):
            planned = "Fewer steps are as good: ask the stock pipeline for those."
        else:
            works = ", ".join(f"{point.work:.3f}" for point in behind)
            planned = f"Fewer steps are as good at {works} of the work: ask for those."
        gain = self.gain(self.paper)
        if gain > 0:
            return planned
        return f"{planned} Not so the paper's key steps (last row): {abs(gain):.1f} dB behind fewer steps."

    def sampler_rows(self) -> list[tuple[str, ...]]:
        """Returns column names, then a row for each of `samplers`, the cheapest first."""
        rows = sorted(self.samplers, key=lambda row: (row.unet_runs, row.converged))
        cells = [
            (row.sampler, row.method, f"{row.steps}", f"{row.unet_runs:.1f}", f"{row.converged:.1f}") for row in rows
        ]
        return [("sampler", "method", "steps", "UNet runs", "converged"), *cells]

    def sampler_verdict(self) -> str:
        """Names the closest sampler and method within the work of the recommended point, in one sentence.

        Without a recommended point, within half of the steps' work.
        """
        point, steps = self.recommended(), len(self.timesteps) - self.start
        most = steps * (0.5 if point is None else point.work)
        within = [row for row in self.samplers if row.unet_runs < most + 0.05]
        if not within:
            return f"No sampler was tried with at most {most:.1f} UNet runs an image."
        within.sort(key=lambda row: (-row.converged, row.unet_runs))
        best, sampler = within[0], self.made_for["scheduler"]["class"]
        verdict = f"For at most {most:.1f} UNet runs an image, the closest to the converged images is {best}"
        own = next((row for row in within if row.sampler == sampler), best)
        return f"{verdict}." if own is best else f"{verdict}; of this plan's sampler {own}."

    def __str__(self) -> str:
        """The pipeline of the plan, the table of its points with the verdict, and that of its samplers."""
        low, high = self.guidance or (0.0, 0.0)
        guidance = f", guidance {low:g}" + (f" to {high:g}" if high > low else "") if self.guidance else ""
        head = (
            f"{self.made_for['UNet']['class']}, {self.made_for['scheduler']['class']}, {len(self.timesteps)} steps"
            f"{guidance}; PSNR of {self.judged} images, fitted to {self.fitted} others"
        )
        parts = [head, _aligned(self.rows()), self.verdict()]
        if self.samplers:
            parts += [_aligned(self.sampler_rows()), self.sampler_verdict()]
        return "\n\n".join(parts)


def _tuples(value: Any) -> Any:
    """Converts the lists of JSON to tuples, recursively."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _aligned(rows: list[tuple[str, ...]]) -> str:
    columns = list(zip(*rows, strict=True))
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))
