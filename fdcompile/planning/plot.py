"""A plan as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from fdcompile.planning.plan import Fewer, Plan, Point


def draw(plan: Plan, path: Path | BinaryIO) -> None:
    """Work against PSNR to the stock pictures: the plan's points, fewer steps, and the paper's key steps."""
    from matplotlib.figure import Figure  # optional; without pyplot, which would look for a screen

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, marker, points in (
        ("planned", "o-", plan.points),
        ("stock, fewer steps", "s--", sorted(plan.fewer, key=lambda own: own.work)),
        ("encoder propagation, the paper's key steps", "^", (plan.paper,)),
    ):
        axes.plot(*_places(points), marker, label=name)
    axes.set_xlabel("FLOPs of the UNet, as a share of stock")
    axes.set_ylabel("PSNR to the stock pictures, dB")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _places(points: Sequence[Point | Fewer]) -> tuple[list[float], list[float]]:
    return [point.work for point in points], [point.fidelity.psnr for point in points]
