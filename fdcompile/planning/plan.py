"""What was measured, and what to make of it: how much work buys how close a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from fdcompile.config import Config, Forecast, Planned
from fdcompile.errors import warn_user
from fdcompile.forecasting.fit import Weights
from fdcompile.io import write_json
from fdcompile.measure.fidelity import Fidelity
from fdcompile.measure.plot import Plot, Series, plot_work
from fdcompile.pipeline.identity import describe_parts, differences_of, digests_of

SCHEMA = 1

_COLUMNS = (
    "work",
    "encoder runs",
    "cut",
    "forecast",
    "PSNR",
    "latents",
    "SSIM",
    "converged",
    "fewer steps",
    "closer by",
)


@dataclass(frozen=True)
class Point:
    """A way to run the UNet that was tried.

    Attributes:
        cut: its name; `recompute` are its modules.
        forecast: ``"held"``, ``"linear"``, ``"fitted"`` (to stock runs), ``"refitted"`` (to the planned runs) or
            ``"auto"``, the default's, which needs no plan: it is for any schedule and guidance.
        key_steps: indices into the schedule.
        weights: of each step, None where features are held, or forecast as by default.
        work: FLOPs of the UNet, as a share of stock's.
        encoder_runs: in a run.
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
    """The fewer-steps baseline: the stock pipeline with fewer steps, of which `work` is the share of UNet calls."""

    steps: int
    work: float
    fidelity: Fidelity

    def __str__(self) -> str:
        return f"stock with {self.steps} steps: {self.work:.3f} of the work, {self.fidelity.psnr:.1f} dB"


Measured = TypeVar("Measured", Point, FewerSteps)


@dataclass(frozen=True)
class SamplerRow:
    """A sampler in the calls that a plan is judged by.

    Attributes:
        sampler: class of the scheduler.
        method: ``"stock"``, ``"default"`` or ``"planned"``.
        steps: sampling steps.
        unet_runs: for each picture: FLOPs of the UNet, as a multiple of those of one stock call.
        converged: PSNR to the stock run with many steps, in dB.
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
    """Where to recompute, and how to forecast between, for one model, one schedule and one kind of calls.

    ``print(plan)`` is a table. Of what was tried it holds what nothing cheaper equals.

    Attributes:
        made_for: digests of the UNet and of the scheduler.
        made_with: versions.
        timesteps: of the whole schedule.
        guidance: smallest and largest guidance scale of the calls, None for pipelines that say none.
        fitted, judged: pictures that the weights were fitted to, and those that `Fidelity` is of.
        points: the cheapest first.
        baselines: for each point the stock pipeline with the steps that at least its work buys; empty where the
            number of steps cannot be chosen.
        paper: encoder propagation at the paper's key steps.
        start: the first step that the calls ran.
        samplers: other samplers and this one beside each other, where that was asked for.
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
        """What to give `fdcompile.optimize`: that of a `point`. Warns where fewer steps are as close at its work.

        Raises:
            ValueError, TypeError: as `point`.
        """
        point = self.point(work=work, psnr=psnr)
        if self.gain(point) <= 0:
            warn_user(f"{point}: {self.baseline(point)} is as close")
        return self.configured(point)

    def point(self, *, work: float | None = None, psnr: float | None = None) -> Point:
        """The closest for at most `work`, a share of the stock UNet's FLOPs, or the cheapest of at least `psnr` dB.

        Raises:
            ValueError: nothing that was tried is within that; the nearest is named.
            TypeError: neither or both are given.
        """
        if (work is None) == (psnr is None):
            raise TypeError(f"work={work}, psnr={psnr}: expected one of the two")
        if work is not None:
            within = [point for point in reversed(self.points) if point.work <= work]
            asked, nearest = f"work={work}", self.points[0]
        else:
            within = [point for point in self.points if psnr is not None and point.fidelity.psnr >= psnr]
            asked, nearest = f"psnr={psnr}", self.points[-1]
        if not within:
            raise ValueError(f"{asked}: nothing that was tried is within that, the nearest is {nearest}")
        return within[0]

    def best(self) -> Config:
        """What ``fdcompile.optimize(pipe, plan)`` runs: that of `recommended`.

        Raises:
            ValueError: nothing is closer than fewer steps at the same work, which are recommended.
        """
        if (point := self.recommended()) is None:
            raise ValueError(f"fewer steps are as good everywhere: {self.baseline(self.points[0])} is one of them")
        return self.configured(point)

    def recommended(self) -> Point | None:
        """What gains most: decibels above fewer steps, times the share of the work that it saves; None if nothing."""
        point = max(self.points, key=lambda point: self.gain(point) * (1 - point.work))
        return point if self.gain(point) > 0 else None

    def configured(self, point: Point) -> Config:
        """The configuration of one of `points`."""
        work = point.encoder_runs / (len(self.timesteps) - self.start)
        if point.forecast == "auto":
            return Config("auto", point.recompute, "auto", work)
        planned = Planned(
            self.timesteps, point.key_steps, point.weights, self.guidance, self.start, digests_of(self.made_for)
        )
        forecast: Forecast = "hold" if point.weights is None else "auto"
        return Config("auto", point.recompute, forecast, work, planned)

    def baseline(self, point: Point) -> FewerSteps | None:
        """The stock pipeline with as many steps as at least the work of `point` buys, or one step left out."""
        by_work = sorted(self.baselines, key=lambda baseline: baseline.work)
        return next((baseline for baseline in by_work if baseline.work >= point.work), by_work[-1] if by_work else None)

    def gain(self, point: Point) -> float:
        """The gain of `point` over its fewer-steps baseline, in dB; its PSNR where there is none."""
        baseline = self.baseline(point)
        return point.fidelity.psnr - (baseline.fidelity.psnr if baseline is not None else 0.0)

    def differences(self, pipe: Any) -> list[str]:
        """What of `pipe` differs from the pipeline that this plan was made for. It reads all weights of the UNet."""
        return differences_of(digests_of(describe_parts(pipe)), digests_of(self.made_for))

    def check(self, pipe: Any) -> None:
        """Refuses a pipeline that this plan was not made for.

        Raises:
            ValueError: naming what differs.
        """
        if different := self.differences(pipe):
            raise ValueError(
                f"this plan is for another pipeline ({', '.join(different)} differ): make one with this one, by "
                f"fdcompile.plan or `fdcompile plan`, in the precision that it runs in"
            )

    def save(self, path: str | Path) -> None:
        """Writes JSON, atomically."""
        write_json(Path(path), {"schema": SCHEMA} | asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is no plan, or one of another schema.
            FileNotFoundError: there is no such file.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            values = _tuples(json.loads(text.replace('"fresh"', '"recompute"')))  # earlier plans have other names
            if "fewer" in values:
                values["baselines"] = values.pop("fewer")
            if values.pop("schema") != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA}")
            values["points"] = tuple(_measured(Point, point) for point in values["points"])
            values["baselines"] = tuple(_measured(FewerSteps, baseline) for baseline in values["baselines"])
            values["samplers"] = tuple(SamplerRow(**row) for row in values.get("samplers", ()))
            plan = cls(**values | {"paper": _measured(Point, values["paper"])})
            if not plan.points:
                raise ValueError("it has no points")
            for point in plan.points:
                plan.configured(point)  # refuses what is no schedule, no key steps or no weights
            str(plan)  # likewise of figures and digests
            return plan
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no plan of this version of fdcompile: {error}") from error

    def plot(self, path: str | Path) -> None:
        """Writes `drawing` to a picture file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        self.drawing().save(Path(path))

    def drawing(self) -> Plot:
        """Work against PSNR, with fewer steps and the paper's key steps, and the recommended point marked.

        Raises:
            ImportError: matplotlib is not installed.
        """
        best = self.recommended()
        return plot_work(
            [
                Series("planned", [(point.work, point.fidelity.psnr) for point in self.points], "o-"),
                Series(
                    "stock, fewer steps",
                    sorted((baseline.work, baseline.fidelity.psnr) for baseline in self.baselines),
                    "s--",
                    is_baseline=True,
                ),
                Series(
                    "encoder propagation, the paper's key steps", [(self.paper.work, self.paper.fidelity.psnr)], "^"
                ),
            ],
            None if best is None else ("recommended", best.work, best.fidelity.psnr),
        )

    def rows(self) -> list[tuple[str, ...]]:
        """Names of columns, and a row for each point and for the paper's key steps; columns that are empty left out."""
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
        """Says which points are closer to stock than fewer steps at the same work, and whether the paper's are."""
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
        """Names of columns, and a row for each of `samplers`, the cheapest first."""
        rows = sorted(self.samplers, key=lambda row: (row.unet_runs, row.converged))
        cells = [
            (row.sampler, row.method, f"{row.steps}", f"{row.unet_runs:.1f}", f"{row.converged:.1f}") for row in rows
        ]
        return [("sampler", "method", "steps", "UNet runs", "converged"), *cells]

    def sampler_verdict(self) -> str:
        """Which sampler to use, and how, for the work of the recommended point; else for half of the steps' work."""
        point, steps = self.recommended(), len(self.timesteps) - self.start
        most = steps * (0.5 if point is None else point.work)
        within = sorted(
            (row for row in self.samplers if row.unet_runs < most + 0.05),
            key=lambda row: (-row.converged, row.unet_runs),
        )
        if not within:
            return f"No sampler was tried with at most {most:.1f} UNet runs a picture."
        best, sampler = within[0], self.made_for["scheduler"]["class"]
        verdict = f"For at most {most:.1f} UNet runs a picture, the closest to the converged pictures is {best}"
        if best.sampler == sampler:
            return f"{verdict}."
        others = [f"{row}" for row in within if row.sampler == sampler][:1]
        return f"{verdict}; of this plan's sampler {others[0]}." if others else f"{verdict}."

    def __str__(self) -> str:
        """What the plan was made for, a table of its points, and the verdict; likewise of its samplers."""
        low, high = self.guidance or (0.0, 0.0)
        guidance = f", guidance {low:g}" + (f" to {high:g}" if high > low else "") if self.guidance else ""
        head = (
            f"{self.made_for['UNet']['class']}, {self.made_for['scheduler']['class']}, {len(self.timesteps)} steps"
            f"{guidance}; PSNR of {self.judged} pictures, fitted to {self.fitted} others"
        )
        parts = [head, _aligned(self.rows()), self.verdict()]
        if self.samplers:
            parts += [_aligned(self.sampler_rows()), self.sampler_verdict()]
        return "\n\n".join(parts)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, at any depth."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _measured(kind: type[Measured], values: dict[str, Any]) -> Measured:
    return kind(**values | {"fidelity": Fidelity(**values["fidelity"])})


def _aligned(rows: list[tuple[str, ...]]) -> str:
    columns = list(zip(*rows, strict=True))
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))
