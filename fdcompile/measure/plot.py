"""Plots, each drawn for a light and for a dark page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from fdcompile.io import atomic_write

FEWER = "tab:gray"
"""Color of the fewer-steps baseline."""

DARK = "#0d1117"
"""Background of the dark image."""


@dataclass(frozen=True)
class Plot:
    """A plot as PNG, with a light and with a dark background."""

    light: bytes
    dark: bytes

    def save(self, path: Path) -> None:
        """Writes the light image, atomically."""
        with atomic_write(path) as partial:
            partial.write_bytes(self.light)


@dataclass(frozen=True)
class Series:
    """Points of work against PSNR.

    Attributes:
        name: label in the legend.
        points: pairs of share of stock's FLOPs and PSNR in dB.
        style: format string of matplotlib, such as ``"o-"``.
        is_baseline: whether the series is stock with fewer steps.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "o"
    is_baseline: bool = False


def render(draw: Callable[[Any], None], size: tuple[float, float], dpi: int = 150) -> Plot:
    """Renders the drawing of `draw` on a figure of `size`, in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import style
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    drawn = []
    ground: dict[str, Any] = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), DARK)
    styles: tuple[list[str | dict[str, Any]], ...] = (["default"], ["dark_background", ground])
    for names in styles:
        with style.context(names):
            figure, png = Figure(figsize=size, layout="constrained"), BytesIO()
            draw(figure)
            figure.savefig(png, dpi=dpi, format="png")
            drawn.append(png.getvalue())
    return Plot(*drawn)


def plot_work(series: Sequence[Series], marked: tuple[str, float, float] | None = None) -> Plot:
    """Plots work against PSNR to the stock images.

    Args:
        series: the points.
        marked: name, work and PSNR of a highlighted point.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for line in series:
            color = {"color": FEWER} if line.is_baseline else {}
            points = zip(*line.points, strict=True) if line.points else ((), ())
            axes.plot(*points, line.style, label=line.name, **color)
        if marked is not None:
            name, work, psnr = marked
            axes.plot([work], [psnr], "o", markersize=16, fillstyle="none", color="tab:red", label=name)
        axes.set(xlabel="FLOPs of the UNet, as a share of stock", ylabel="PSNR to the stock images, dB")
        axes.set_xlim(0, 1.05 * max((work for line in series for work, _ in line.points), default=1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")

    return render(draw, (5.5, 4), dpi=200)  # narrow, so that the text is readable on a phone
