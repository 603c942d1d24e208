"""batch_steps: vmap traced away, equal to one step after the other."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import DECODER, toy_graph

from fdcompile.graph.program import Stage, StagedProgram
from fdcompile.graph.text import graph_text
from fdcompile.passes import batch_steps, run_passes


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
        stage.graph_module(*(t[step] if by_step else t for t, by_step in zip(tensors, stepwise, strict=True)))[0]
        for step in range(steps)
    ]
    return torch.stack(outputs)


def test_golden(golden: Any) -> None:
    graph_module, _ = toy_graph()
    decoder = run_passes(graph_module, DECODER).stages["decoder"]
    batched = batch_steps(decoder)
    golden("batch_steps", graph_text(batched))
    tensors = arguments(decoder, 4, 3)
    with torch.no_grad():
        torch.testing.assert_close(batched(*tensors)[0], one_by_one(decoder, tensors, 4))


@pytest.mark.parametrize("name", ["schedule", "decoder"])
def test_one_graph_equals_one_step_after_the_other_for_all_sizes(staged: StagedProgram, name: str) -> None:
    stage = staged.stages[name]
    batched = batch_steps(stage)
    for steps, batch in ((1, 2), (2, 1), (1, 1), (5, 3), (16, 2)):
        tensors = arguments(stage, steps, batch)
        with torch.no_grad():
            expected = one_by_one(stage, tensors, steps)
            torch.testing.assert_close(batched(*tensors)[0], expected, rtol=1e-4, atol=1e-5)


def test_operations_stay_whole_and_no_slice_is_computed_alone(staged: StagedProgram) -> None:
    decoder = staged.stages["decoder"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        batched = batch_steps(decoder)
    one, three = decoder.op_counts, Stage((), (), "", batched).op_counts
    for op in ("conv2d.default", "group_norm.default", "linear.default", "layer_norm.default", "cat.default",
               "scaled_dot_product_attention.default", "upsample_nearest2d.vec"):  # fmt: skip
        assert three[f"aten.{op}"] == one[f"aten.{op}"] > 0
    assert not [op for op in three if op.startswith("fdcompile") or "vmap" in op or "for_cpu" in op]
    assert three["aten.sym_size.int"] == 2


def test_an_operation_that_fixes_the_number_of_steps_is_refused(
    staged: StagedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = staged.stages["decoder"]
    kept_whole = importlib.import_module("fdcompile.passes.batch_steps")._WRAPPED
    monkeypatch.delitem(kept_whole, torch.ops.aten.cat.default)
    with pytest.raises(NotImplementedError, match=r"fixes a size that must remain symbolic at aten\.cat"):
        batch_steps(decoder)


def test_an_operation_that_vmap_fails_at_is_refused() -> None:
    graph_module, _ = toy_graph()
    decoder = run_passes(graph_module, DECODER).stages["decoder"]
    node = next(node for node in decoder.graph_module.graph.nodes if node.target is torch.ops.aten.silu.default)
    node.target = torch.ops.aten.nonzero.default
    with pytest.raises(NotImplementedError, match=r"vmap cannot take aten\.nonzero\.default \(silu\w*\): "):
        batch_steps(decoder)


def test_weights_are_shared(staged: StagedProgram) -> None:
    decoder = staged.stages["decoder"]
    weights = {id(parameter) for parameter in decoder.graph_module.parameters()}
    assert {id(parameter) for parameter in batch_steps(decoder).parameters()} == weights


def test_a_weight_that_differs_between_steps_is_refused() -> None:
    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.fdcompile.conv2d(x, weight)

    with pytest.raises(RuntimeError, match="argument 1 differs between steps"):
        torch.func.vmap(convolve, in_dims=(None, 0))(torch.randn(1, 2, 4, 4), torch.randn(3, 2, 2, 1, 1))
