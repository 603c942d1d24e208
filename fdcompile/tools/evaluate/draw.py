"""An evaluation as a picture."""

from __future__ import annotations

from io import BytesIO

from fdcompile.tools.evaluate.evaluate import Evaluation, Row


def draw(evaluation: Evaluation) -> bytes:
    """Share of stock's FLOPs against PSNR to the stock pictures, as a PNG: fewer steps, and every other way."""
    from matplotlib.figure import Figure  # optional; without pyplot, which would look for a screen

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in evaluation.rows if row.quality.psnr is not None]
    for reference in dict.fromkeys(row.reference for row in rows):
        fewer = sorted(
            (row for row in rows if row.reference == reference and row.cost.timeline is None), key=lambda row: row.share
        )
        axes.plot(*_places(fewer), "s--", label=f"{reference}, fewer steps")
    for row in rows:
        if row.cost.timeline is not None:
            axes.plot(*_places([row]), "o", label=row.way)
    axes.set_xlabel("FLOPs of the UNet, as a share of stock")
    axes.set_ylabel("PSNR to the stock pictures, dB")
    axes.set_xlim(0, 1.05)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    png = BytesIO()
    figure.savefig(png, dpi=150)
    return png.getvalue()


def _places(rows: list[Row]) -> tuple[list[float], list[float]]:
    return [row.share for row in rows], [row.quality.psnr or 0.0 for row in rows]
