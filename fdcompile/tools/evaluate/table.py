"""Results of an evaluation as rows, tables and JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from fdcompile.io import write_json
from fdcompile.measure.cost import Cost
from fdcompile.measure.plot import Plot, Series, plot_work
from fdcompile.measure.quality import Quality
from fdcompile.measure.report import finding


@dataclass(frozen=True)
class Row:
    """Results of one variant.

    Attributes:
        variant: name of the variant.
        reference: name of the stock pipeline it is compared with; None for that pipeline itself.
        steps: sampling steps.
        images: number of captions with an image.
        share: FLOPs as a share of the reference's.
        cost: measured cost.
        quality: measured quality.
    """

    variant: str
    reference: str | None
    steps: int
    images: int
    share: float
    cost: Cost
    quality: Quality

    @property
    def is_baseline(self) -> bool:
        """Whether this is the stock pipeline with fewer steps."""
        return self.reference is not None and self.cost.timeline is None

    @property
    def ftc(self) -> float | None:
        """Fréchet distance times seconds per image over CLIP score (Table 3); None if one of them is unknown."""
        if self.quality.frechet is None or not self.quality.clip:
            return None
        return self.quality.frechet * self.cost.seconds / self.quality.clip


@dataclass(frozen=True)
class Evaluation:
    """Results of `evaluate`.

    Attributes:
        rows: results in the order of measurement. A stock pipeline precedes the variants compared with it, and a
            variant that is cheaper than stock is followed by its fewer-steps baseline.
        distance_name: name of the Fréchet distance.
        missing: one sentence for each metric that was left out and each baseline that cannot run.
    """

    rows: tuple[Row, ...]
    distance_name: str
    missing: tuple[str, ...]

    def tables(self) -> dict[str, list[list[str]]]:
        """Returns the tables of cost and quality: column names, then a row for each variant.

        Omits columns that are empty for all variants.
        """
        names: dict[str, Callable[[Row], str]] = {
            "variant": lambda row: row.variant,
            "steps": lambda row: str(row.steps),
            "of stock's FLOPs": lambda row: f"{row.share:.3f}",
        }
        cost: dict[str, Callable[[Row], str]] = {
            "GFLOP per image": lambda row: f"{row.cost.gflop:.4g}",
            "encoder runs": lambda row: str(row.cost.unet_calls),
            "s per image": lambda row: f"{row.cost.seconds:.3g}",
            "s of stock just before": lambda row: _cell(row.cost.stock_seconds, ".3g"),
            "s of the UNet": lambda row: f"{row.cost.unet_seconds:.3g}",
            "time, share of stock": lambda row: _cell(row.cost.ratio, ".2f"),
            "memory, MB": lambda row: _cell(row.cost.memory and row.cost.memory / 1e6, ".3g"),
        }
        quality: dict[str, Callable[[Row], str]] = {
            self.distance_name: lambda row: _cell(row.quality.frechet, ".4g"),
            "CLIP score": lambda row: _cell(row.quality.clip, ".3f"),
            "FTC": lambda row: _cell(row.ftc, ".3g"),
            "PSNR, dB": lambda row: _cell(row.quality.psnr, ".1f"),
            "SSIM": lambda row: _cell(row.quality.ssim, ".3f"),
            "LPIPS": lambda row: _cell(row.quality.lpips, ".3f"),
            "read correctly": lambda row: _cell(row.quality.read, ".1%"),
        }
        return {"Cost": self._table(names | cost), "Quality": self._table(names | quality)}

    def _table(self, columns: dict[str, Callable[[Row], str]]) -> list[list[str]]:
        cells = {name: [cell(row) for row in self.rows] for name, cell in columns.items()}
        shown = {name: column for name, column in cells.items() if any(column)}
        return [list(shown), *map(list, zip(*shown.values(), strict=True))]

    def baseline(self, row: Row) -> Row | None:
        """Returns the cheapest fewer-steps baseline with at least the work of `row`, else the most expensive one."""
        baselines = [other for other in self.rows if other.reference == row.reference and other.is_baseline]
        baselines.sort(key=lambda baseline: baseline.share)
        enough = (baseline for baseline in baselines if baseline.share >= row.share - 1e-9)
        return next(enough, baselines[-1] if baselines else None)

    def finding(self) -> str:
        """Describes the variant with the largest gain over fewer steps at the same work, in one sentence."""
        rows = [row for row in self.rows if row.quality.psnr is not None and not row.is_baseline]
        if not rows:
            return f"{len(self.rows)} variants, {self.rows[0].images} images each."
        best = max(rows, key=lambda row: (_psnr(row) - _psnr(self.baseline(row))) * (1 - row.share))
        baseline = self.baseline(best)
        fewer = None if baseline is None else (baseline.steps, _psnr(baseline))
        return finding(best.variant, _psnr(best), best.share, fewer)

    def plot(self) -> Plot:
        """Plots work against PSNR to the stock images, of the fewer-steps baselines and all other variants.

        Raises:
            ImportError: matplotlib is not installed.
        """
        rows = [row for row in self.rows if row.quality.psnr is not None]
        series = []
        for reference in dict.fromkeys(row.reference for row in rows):
            fewer = sorted(_place(row) for row in rows if row.reference == reference and row.is_baseline)
            series.append(Series(f"{reference}, fewer steps", fewer, "s--", is_baseline=True))
        return plot_work(series + [Series(row.variant, [_place(row)]) for row in rows if not row.is_baseline])

    def save(self, path: Path) -> None:
        """Writes JSON, atomically."""
        values = asdict(self)
        for row, entry in zip(self.rows, values["rows"], strict=True):
            entry["ftc"] = row.ftc
        write_json(path, values)


def _psnr(row: Row | None) -> float:
    return (row and row.quality.psnr) or 0.0


def _place(row: Row) -> tuple[float, float]:
    return row.share, _psnr(row)


def _cell(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)
