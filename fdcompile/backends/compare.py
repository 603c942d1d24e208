"""Compare what a stage was written as with its graph."""

from __future__ import annotations

import torch
from torch import Tensor

from fdcompile.backends.protocols import Lowered
from fdcompile.backends.stored import StageExport
from fdcompile.errors import PackageError

TOLERANCES = {torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Of the largest value of an output, by its type; other types have `TOLERANCE`."""

TOLERANCE = 1e-3


def check_stage(stage: StageExport, lowered: Lowered, which: int = 1) -> None:
    """Compares `lowered` with the graph of `stage`, at the size that `largest_error` takes as `which`.

    Raises:
        PackageError: they differ by more than the output's type allows.
    """
    error, dtype = largest_error(stage, lowered, which)
    allowed = TOLERANCES.get(dtype, TOLERANCE)
    if not error <= allowed:
        raise PackageError(
            f"stage {stage.name} as written differs from its graph by {error:.1e} of the largest value, "
            f"{allowed:.0e} are allowed in {dtype}: nothing was exported. Try another format or precision"
        )


def largest_error(stage: StageExport, lowered: Lowered, which: int = 1) -> tuple[float, torch.dtype]:
    """Largest difference over the largest value, of all outputs, and the type of the one that has it.

    `which` size is 0 for the smallest, 1 for the usual, 2 for the largest of the ranges that `stage` was exported for.
    """
    inputs = random_inputs(stage, which)
    with torch.no_grad():
        expected = stage.program.module(check_guards=False)(*inputs)
        actual = lowered(*inputs)
    errors = [
        (float((computed.float() - other.float()).abs().max() / other.float().abs().max().clamp(min=1)), other.dtype)
        for computed, other in zip(actual, expected, strict=True)
    ]
    return max(errors, key=lambda pair: (pair[0] != pair[0], pair[0]), default=(0.0, torch.float32))


def random_inputs(stage: StageExport, which: int) -> list[Tensor]:
    """Inputs of `stage` of a size that it takes; whole numbers are those of timesteps."""
    generator = torch.Generator().manual_seed(which)
    drawn = []
    for example, sizes in zip(stage.examples, stage.shapes, strict=True):
        if example.is_floating_point():
            values = torch.randn(sizes[which], generator=generator)
        else:
            values = torch.randint(0, 2 if example.dtype == torch.bool else 999, sizes[which], generator=generator)
        drawn.append(values.to(example.device, example.dtype))
    return drawn
