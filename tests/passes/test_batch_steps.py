"""batch_steps: vmap traced away, equal to one step after the other."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, fx
from toy import DECODER, ops, toy_graph

import fdcompile
from fdcompile.passes import batch_steps, run_passes
from fdcompile.program import Stage


def arguments(stage: Stage, steps: int, batch: int) -> list[Tensor]:
    """Random inputs; those that differ between steps have a leading axis of `steps`."""
    tensors = []
    for value in stage.inputs:
        shape = [batch if size == "B" else int(size) for size in value.shape]
        leading = [steps] if value.name in stage.stepwise_inputs else []
        size = [*leading, *shape]
        tensors.append(torch.randint(1000, size) if value.dtype == torch.int64 else torch.randn(size))
    return tensors


def one_by_one(stage: Stage, tensors: list[Tensor], steps: int) -> Tensor:
    stepwise = [value.name in stage.stepwise_inputs for value in stage.inputs]
    outputs = [
        stage.graph_module(*(t[step] if own else t for t, own in zip(tensors, stepwise, strict=True)))[0]
        for step in range(steps)
    ]
    return torch.stack(outputs)


def test_golden() -> None:
    graph_module, _ = toy_graph()
    decoder = run_passes(graph_module, DECODER).stages["decoder"]
    tensors = arguments(decoder, 4, 3)
    batched = batch_steps(decoder, tensors)
    assert ops(decoder.graph_module) == [
        *("add.Tensor", "conv2d.default", "add.Tensor", "silu.default", "conv2d.default")
    ]
    assert ops(batched) == [
        *("add.Tensor", "view.default", "conv2d.default", "view.default"),
        *("add.Tensor", "silu.default", "view.default", "conv2d.default", "view.default"),
    ]
    with torch.no_grad():
        torch.testing.assert_close(batched(*tensors)[0], one_by_one(decoder, tensors, 4))


@pytest.mark.parametrize("name", ["schedule", "decoder"])
@pytest.mark.parametrize(("steps", "batch"), [(1, 2), (2, 1), (5, 3)])
def test_equals_one_step_after_the_other(captured: fx.GraphModule, name: str, steps: int, batch: int) -> None:
    stage = run_passes(captured, fdcompile.DECODER).stages[name]
    tensors = arguments(stage, steps, batch)
    with torch.no_grad():
        batched = batch_steps(stage, tensors)(*tensors)[0]
        torch.testing.assert_close(batched, one_by_one(stage, tensors, steps), rtol=1e-4, atol=1e-5)


def test_operations_stay_whole_and_no_slice_is_computed_alone(captured: fx.GraphModule) -> None:
    decoder = run_passes(captured, fdcompile.DECODER).stages["decoder"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        batched = batch_steps(decoder, arguments(decoder, 3, 2))
    one, three = decoder.op_counts, Stage("", batched, (), ()).op_counts
    for op in ("conv2d.default", "group_norm.default", "linear.default", "layer_norm.default",
               "scaled_dot_product_attention.default", "upsample_nearest2d.vec"):  # fmt: skip
        assert three[f"aten.{op}"] == one[f"aten.{op}"] > 0
    assert not [op for op in three if op.startswith("fdcompile") or "vmap" in op or "for_cpu" in op]


def test_weights_are_shared(captured: fx.GraphModule) -> None:
    decoder = run_passes(captured, fdcompile.DECODER).stages["decoder"]
    batched = batch_steps(decoder, arguments(decoder, 2, 2))
    own = {id(parameter) for parameter in decoder.graph_module.parameters()}
    assert {id(parameter) for parameter in batched.parameters()} == own


def test_a_weight_that_differs_between_steps_is_refused() -> None:
    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.fdcompile.conv2d(x, weight)

    with pytest.raises(RuntimeError, match="argument 1 differs between steps"):
        torch.func.vmap(convolve, in_dims=(None, 0))(torch.randn(1, 2, 4, 4), torch.randn(3, 2, 2, 1, 1))
