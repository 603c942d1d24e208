"""Compares a stage as written to files with its graph."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdcompile.backends.protocols import Lowered
from fdcompile.backends.stored import StageExport
from fdcompile.errors import PackageError

TOLERANCES = {torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Tolerated error relative to the largest value of an output, by type; `TOLERANCE` for other types."""

TOLERANCE = 1e-3


def check_stage(stage: StageExport, lowered: Lowered, which: int = 1) -> None:
    """Compares `lowered` with the graph of `stage` at size `which` (see `largest_error`).

    Raises:
        PackageError: an output differs by more than the tolerance of its type.
    """
    error, dtype = largest_error(stage, lowered, which)
    allowed = TOLERANCES.get(dtype, TOLERANCE)
    if not error <= allowed:
        raise PackageError(
            f"stage {stage.name} as written differs from its graph by {error:.1e} of the largest value, "
            f"{allowed:.0e} are allowed in {dtype}: nothing was exported. Try another format or precision"
        )


def largest_error(stage: StageExport, lowered: Lowered, which: int = 1) -> tuple[float, torch.dtype]:
    """Computes the largest difference between `lowered` and the graph of `stage`, relative to the largest value.

    Args:
        stage: stage with its graph.
        lowered: the callable to compare.
        which: size of the inputs, out of the ranges of `stage`: 0 is the smallest, 1 the usual, 2 the largest.

    Returns:
        The largest error of all outputs, and the type of that output.
    """
    inputs = random_inputs(stage, which)
    with torch.no_grad():
        expected = stage.program.module(check_guards=False)(*inputs)
        actual = lowered(*inputs)
    errors = [
        (float((computed.float() - other.float()).abs().max() / other.float().abs().max().clamp(min=1)), other.dtype)
        for computed, other in zip(actual, expected, strict=True)
    ]
    return max(errors, key=lambda pair: (math.isnan(pair[0]), pair[0]), default=(0.0, torch.float32))


def random_inputs(stage: StageExport, which: int) -> list[Tensor]:
    """Random inputs of size `which` for `stage`; integers are drawn from the range of timesteps."""
    generator = torch.Generator().manual_seed(which)
    drawn = []
    for example, sizes in zip(stage.examples, stage.shapes, strict=True):
        if example.is_floating_point():
            values = torch.randn(sizes[which], generator=generator)
        else:
            values = torch.randint(0, 2 if example.dtype == torch.bool else 999, sizes[which], generator=generator)
        drawn.append(values.to(example.device, example.dtype))
    return drawn
