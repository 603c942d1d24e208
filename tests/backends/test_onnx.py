"""What is written as ONNX computes what the stage does."""

from __future__ import annotations

from pathlib import Path

import torch
from planted import plant
from torch import Tensor, nn

from fdcompile.backends.compare import largest_error
from fdcompile.backends.onnx import FORMAT
from fdcompile.backends.stored import StageExport


class Joins(nn.Module):
    """The ways to make one tensor of several, of different types."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        half = x.half()
        return (
            torch.cat([half, x, half], -1),
            torch.concat([x, half]),
            torch.concatenate([half, half]),
            torch.stack([half, x]),
            torch.hstack([half, x]),
            torch.vstack([x.int(), half]),
            torch.column_stack([half, x]),
            torch.where(x > 0, x, half) + half,
        )


def test_types_are_promoted_where_tensors_are_joined(tmp_path: Path) -> None:
    stage = plant(Joins())
    before = str(stage.program.graph)
    error, _ = opened(stage, tmp_path)
    assert error == 0
    assert str(stage.program.graph) == before, "the stage itself is left as it was"


def opened(stage: StageExport, folder: Path) -> tuple[float, torch.dtype]:
    FORMAT.write([stage], folder, lambda line: None)
    lowered = FORMAT.open(folder, {stage.name: stage.packaged}, {}, torch.device("cpu"))
    return largest_error(stage, lowered[stage.name])
