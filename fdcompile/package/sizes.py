"""Converts heights and widths in pixels to symbolic sizes for the capture of a UNet."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

from fdcompile.capture.call import UNetCall
from fdcompile.capture.export import AnySize
from fdcompile.graph.ranges import Range, Sides
from fdcompile.pipeline.record import pixels_per_latent, side_axes


def any_size(
    pipe: Any, call: UNetCall, heights: Range | None, widths: Range | None, arguments: dict[str, Any] | None
) -> AnySize | None:
    """Symbolic sizes for a range of heights or widths in pixels; None if both are fixed.

    `call` has the usual size, which is the default of `heights` and `widths`.

    Raises:
        ValueError: the UNet cannot halve such sizes evenly, or see `side_axes`.
    """
    pixels, (rows, columns) = pixels_per_latent(pipe), call.sample.shape[-2:]
    asked = {"height": heights or Range(*[pixels * rows] * 3), "width": widths or Range(*[pixels * columns] * 3)}
    if all(side.fixed for side in asked.values()):
        return None
    multiple = 2 ** _halvings(pipe.unet)
    step = pixels * multiple
    for name, side in asked.items():
        if any(size % step for size in astuple(side)) or (not side.fixed and side.min < 2 * step):
            raise ValueError(
                f"{name}={astuple(side)}: where a side has a range, all are multiples of {step} pixels, and a smallest "
                f"one is {2 * step} or more"
            )
    rows_range, columns_range = (Range(*(size // pixels for size in astuple(side))) for side in asked.values())
    sides = Sides(rows_range, columns_range, latent_multiple=multiple, pixels_per_latent=pixels)
    return AnySize(sides, side_axes(pipe, call, asked["height"], asked["width"], arguments))


def _halvings(unet: Any) -> int:
    """Number of times that the UNet halves the latents' sides."""
    levels = len(getattr(unet.config, "block_out_channels", (0,)))
    return int(getattr(unet, "num_upsamplers", levels - 1))
