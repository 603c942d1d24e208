"""fold_slices: parts of weights become weights, whose origin is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from toy import DECODER, ops, toy_graph

from fdcompile.graph.weights import WeightSlice
from fdcompile.passes import batch_steps, fold_slices, run_passes


@pytest.mark.parametrize("batched", [False, True])
def test_golden(batched: bool) -> None:
    graph_module, _ = toy_graph()
    decoder = run_passes(graph_module, DECODER).stages["decoder"]
    graph_module = batch_steps(decoder) if batched else decoder.graph_module
    before = ops(graph_module)
    folded, slices = fold_slices(graph_module)
    assert ops(graph_module) == before
    assert "slice.Tensor" not in ops(folded)
    assert [op for op in before if op != "slice.Tensor"] == ops(folded)
    owned = dict(folded.named_parameters())
    for name, part in slices.items():
        whole = graph_module.get_parameter(part.path)
        assert torch.equal(owned[name], whole.narrow(part.dim, part.start, part.stop - part.start))
        assert owned[name].is_contiguous()
        assert part.path not in owned, "of the whole weight nothing is left"
    steps = (3,) if batched else ()
    arguments = [
        torch.randn(*(steps if value.name in decoder.stepwise_inputs else ()), *value.size_for(2))
        for value in decoder.inputs
    ]
    with torch.no_grad():
        assert torch.equal(folded(*arguments)[0], graph_module(*arguments)[0])


def test_what_is_stored_of_all_stages_is_no_more_than_the_unet(captured: fx.GraphModule) -> None:
    def parameters(graph_module: fx.GraphModule) -> int:
        return sum(parameter.numel() for parameter in graph_module.parameters())

    stages = run_passes(captured, ("up_blocks", "conv_norm_out", "conv_act", "conv_out")).stages.values()
    folded = [fold_slices(stage.graph_module) for stage in stages]
    assert sum(len(slices) for _, slices in folded) > 10
    assert sum(parameters(graph_module) for graph_module, _ in folded) == parameters(captured)
    assert sum(parameters(stage.graph_module) for stage in stages) > parameters(captured)


def test_no_slices_and_slices_of_values_are_left_alone() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(6.0))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :2] + self.weight[2:4] + self.weight[4:]

    x = torch.randn(2, 3)
    graph_module = torch.export.export(Halves(), (x,), strict=False).module(check_guards=False)
    folded, slices = fold_slices(graph_module)  # type: ignore[arg-type]
    assert {"weight_0_2_4": WeightSlice("weight", 0, 2, 4)}.items() <= slices.items()
    assert len(slices) == 2
    assert "slice.Tensor" in ops(folded)
    assert torch.equal(folded(x)[0], graph_module(x))
