"""Results of `make bench` as a table, as JSON and as a plot."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.candidates import STOCK
from benchmarks.report import about, finite
from fdcompile.measure.markdown import markdown_table

SAME_DB = 0.05
STEP_MS = 10
"""Milliseconds of a fast UNet step, which the executor's overhead is compared with."""

NOTES = """\
*Time*: of one pipeline call from prompt embeddings to latents (UNet and scheduler), over that of the stock pipeline \
in eager mode, called just before it; median of the pairs, smallest and largest in brackets. The first row of a group \
is stock against itself: its deviation from 1 is the uncertainty of all ratios. *GFLOP*: of the UNet per image, \
guidance included, as counted while running; a compiled row has the FLOPs of the eager one. *Latent error*: norm of \
the difference to the stock latents over their norm. PSNR (dB) and SSIM to the stock image: medians, and only for the \
trained miniature; random weights generate no images, and their latent error does not say what an image would lose."""


@dataclass(frozen=True)
class Row:
    """Results of a candidate in a setting; None for values that were not measured.

    Attributes:
        setting: description of the setting.
        candidate: name of the variant.
        ratios: time over stock's, for each pair.
        gflop: GFLOP of the UNet per image.
        peak_mib: peak memory allocated on the device during a call, weights included.
        latent_error: norm of the difference to the stock latents, relative to their norm.
        psnr: median PSNR in dB to the stock images.
        ssim: median SSIM to the stock images.
        skipped: reason why the candidate was skipped.
    """

    setting: str
    candidate: str
    ratios: tuple[float, ...] = ()
    gflop: float | None = None
    peak_mib: float | None = None
    latent_error: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    skipped: str | None = None

    @property
    def time(self) -> float:
        return statistics.median(self.ratios)


@dataclass(frozen=True)
class CompileTime:
    """Seconds of the first image with "stock", "fdcompile" and a loaded "package", with empty and filled caches."""

    model: str
    cold: dict[str, float]
    warm: dict[str, float]

    @property
    def ratios(self) -> dict[str, float]:
        return {
            "fdcompile cold / stock cold": self.cold["fdcompile"] / self.cold["stock"],
            "fdcompile warm / fdcompile cold": self.warm["fdcompile"] / self.cold["fdcompile"],
            "stock warm / stock cold": self.warm["stock"] / self.cold["stock"],
            "package / fdcompile cold": self.warm["package"] / self.cold["fdcompile"],
            "package / fdcompile warm": self.warm["package"] / self.warm["fdcompile"],
        }


@dataclass
class Results:
    """Results of all benchmarks, added as they run."""

    rows: list[Row] = field(default_factory=list)
    compile_time: CompileTime | None = None
    overhead_us: float | None = None

    def gflop(self, setting: str, candidate: str) -> float | None:
        return next((row.gflop for row in self.rows if (row.setting, row.candidate) == (setting, candidate)), None)

    def markdown(self) -> str:
        parts = [self._table(), NOTES]
        if self.compile_time is not None:
            ratios = (f"{name}: {ratio:.2g}" for name, ratio in self.compile_time.ratios.items())
            head = f"Time of a first image with everything compiled for it, {self.compile_time.model}"
            parts.append(f"{head}: {', '.join(ratios)}.")
        if self.overhead_us is not None:
            share = self.overhead_us / (STEP_MS * 1e3)
            parts.append(f"The executor's own work, with stages stubbed out: {share:.1%} of a {STEP_MS} ms step.")
        parts.append(", ".join(f"{name} {value}" for name, value in about().items()) + ".")
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "speed.md").write_text(self.markdown(), encoding="utf-8")
        results = {
            "about": about(),
            "rows": [finite(asdict(row)) for row in self.rows],
            "compile_time": None if self.compile_time is None else self.compile_time.ratios,
            "executor_us_per_step": self.overhead_us,
        }
        (folder / "speed.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        if points := [row for row in self.rows if row.psnr is not None and math.isfinite(row.psnr)]:
            plot(points, folder / "speed.png")

    def _table(self) -> str:
        head = ["method", "time of stock", "GFLOP per image", "of stock", "latent error", "PSNR", "SSIM"]
        if any(row.peak_mib is not None for row in self.rows):
            head.append("peak MiB")
        lines = []
        for setting, rows in itertools.groupby(self.rows, lambda row: row.setting):
            lines.append([f"**{setting}**", *[""] * (len(head) - 1)])
            lines += [self._cells(row)[: len(head)] for row in rows]
        return markdown_table(head, *lines)

    def _cells(self, row: Row) -> list[str]:
        if row.skipped is not None:
            return [row.candidate, f"skipped: {row.skipped}", *[""] * 6]
        stock = self.gflop(row.setting, STOCK)
        share = row.gflop / stock if row.gflop is not None and stock is not None else None
        return [
            row.candidate,
            f"{row.time:.2f} ({min(row.ratios):.2f} to {max(row.ratios):.2f})",
            _number(row.gflop, ".4g"),
            _number(share, ".3f"),
            _number(row.latent_error, ".1e"),
            _number(row.psnr, ".1f"),
            _number(row.ssim, ".3f"),
            _number(row.peak_mib, ".0f"),
        ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def plot(rows: list[Row], path: Path) -> None:
    """Plots fidelity against time. Of variants with the same images, only the first one is labeled."""
    import matplotlib.pyplot as plt

    def near(row: Row, other: Row) -> bool:
        return abs(other.psnr - row.psnr) < 1.2 and abs(other.time - row.time) < 0.2

    figure, panel = plt.subplots(figsize=(9, 6), layout="constrained")
    families = {"fdcompile": ("tab:blue", "o"), "stock": ("tab:gray", "s"), "peers": ("tab:orange", "^")}
    right = 0.3 * min(row.time for row in rows) + 0.7 * max(row.time for row in rows)
    labeled: list[Row] = []
    for row in rows:
        color, marker = families.get(row.candidate.partition(",")[0], families["peers"])
        panel.scatter(row.time, row.psnr, s=60, c=color, marker=marker)
        if not any(math.isclose(row.psnr, other.psnr, abs_tol=SAME_DB) for other in labeled):
            across, side = (8, "left") if row.time < right else (-8, "right")
            below = marker == "s" or any(near(row, other) and other.psnr > row.psnr for other in rows)
            beside = marker != "s" and any(near(row, other) for other in labeled)
            up = -4 if beside else -14 if below else 6  # baselines are close to the peers, and some rows to each other
            panel.annotate(row.candidate, (row.time, row.psnr), (across, up), textcoords="offset points", ha=side)
            labeled.append(row)
    panel.axvline(1, color="tab:gray", linestyle=":")
    panel.margins(0.08)
    panel.set_title(", ".join({row.setting: None for row in rows}))
    panel.set_xlabel("time, relative to the stock pipeline (left is faster)")
    panel.set_ylabel("PSNR to the stock image in dB (up is closer)")
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
