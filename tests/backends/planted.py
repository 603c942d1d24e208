"""A stage that is no UNet's, for what no UNet has."""

from __future__ import annotations

import torch
from torch import nn

from fdcompile.backends.stored import PackagedStage, StageExport
from fdcompile.graph.program import BindingTime, TensorSpec
from fdcompile.graph.ranges import Range


def plant(module: nn.Module) -> StageExport:
    """The stage ``planted``, which computes `module` of three rows and columns, ``x``; its results are ``y0``, ..."""
    x = torch.randn(3, 3)
    program = torch.export.export(module, (x,))
    inputs = (TensorSpec("x", (3, 3), x.dtype, BindingTime.KEY),)
    outputs = [TensorSpec(f"y{index}", tuple(y.shape), y.dtype, BindingTime.KEY) for index, y in enumerate(module(x))]
    packaged = PackagedStage(inputs, tuple(outputs), Range(1, 1, 1), None, None, (), ((0,), (0,)), {})
    return StageExport("planted", program, (x,), ((x.shape,) * 3,), {}, packaged)
