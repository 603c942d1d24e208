"""forecast_features: the decoder reads what the last two key steps predict, and nothing else changes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from test_batch_steps import arguments, one_by_one
from torch import Tensor, fx
from toy import DECODER, ops, toy_graph

import fdcompile
from fdcompile.graph.program import FORECAST_WEIGHT, BindingTime, Stage, StagedProgram, TensorSpec
from fdcompile.passes import batch_steps, forecast_features, run_passes
from fdcompile.passes.verify import VerificationError, verify_program

CUTS = [fdcompile.DECODER, fdcompile.PARTIAL_ENCODER, fdcompile.deep_feature_caching(3)]
FORECAST = Counter({"aten.sub.Tensor": 1, "aten.mul.Tensor": 1, "aten.add.Tensor": 1})


def forecast_outside(held: StagedProgram, known: dict[str, Tensor]) -> Tensor:
    """What the decoder of `held` makes of features that were forecast before it is called."""
    weight = known[FORECAST_WEIGHT]
    given = [known[value.name] for value in held.stages["decoder"].inputs]
    for place, value in enumerate(held.stages["decoder"].inputs):
        if f"{value.name}_before" in known:
            given[place] = (1 - weight) * given[place] + weight * known[f"{value.name}_before"]
    return held.stages["decoder"].graph_module(*given)[0]


def test_golden() -> None:
    graph_module, _ = toy_graph()
    program = run_passes(graph_module, DECODER, forecast=True)
    decoder = program.stages["decoder"]
    assert [f"{value} [{value.time}]" for value in decoder.inputs] == [
        "conv2d_3: float32[B, 4, 4, 4] [key]",
        "unsqueeze_4: float32[B, 4, 1, 1] [schedule]",
        "unsqueeze_6: float32[B, 4, 1, 1] [prompt]",
        "conv2d_3_before: float32[B, 4, 4, 4] [key before]",
        "forecast_weight: float32[] [schedule]",
    ]
    assert ops(decoder.graph_module) == [
        *("sub.Tensor", "mul.Tensor", "add.Tensor"),
        *("add.Tensor", "conv2d.default", "add.Tensor", "silu.default", "conv2d.default"),
    ]
    assert program.features_before == {"conv2d_3_before": "conv2d_3"}


def test_a_reused_output_gets_a_decoder_that_is_its_forecast() -> None:
    graph_module, _ = toy_graph()
    program = run_passes(graph_module, (), forecast=True)
    decoder = program.stages["decoder"]
    assert ops(decoder.graph_module) == ["sub.Tensor", "mul.Tensor", "add.Tensor"]
    assert [value.name for value in program.features] == ["conv2d_5"]
    assert [value.name for value in decoder.outputs] == [program.output]
    assert program.parallel
    f, before, weights = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.0, -0.5, -2.0])
    (actual,) = batch_steps(decoder)(f, before, weights)
    expected = torch.stack([(1 - w) * f + w * before for w in weights])
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_less_than_two_large_terms_would(dtype: torch.dtype) -> None:
    """Features that differ by a twentieth, weighed 2.87 and -1.87: measured at most 1.0 units of 1 against 4.6."""
    graph_module, _ = toy_graph()
    decoder = run_passes(graph_module, (), forecast=True).stages["decoder"].graph_module
    f = (1 + torch.rand(10_000)).to(dtype)
    before = (f * 0.95).to(dtype)
    exact = 2.87 * f.double() - 1.87 * before.double()
    (forecast,) = decoder(f, before, torch.tensor(-1.87, dtype=dtype))
    two_terms = torch.tensor(2.87, dtype=dtype) * f + torch.tensor(-1.87, dtype=dtype) * before
    error, other = (
        float((values.double() - exact).abs().max()) / torch.finfo(dtype).eps for values in (forecast, two_terms)
    )
    assert error <= 1.2 < other


@pytest.mark.parametrize("cut", CUTS)
def test_equals_forecasting_outside_of_a_real_unet(captured: fx.GraphModule, cut: tuple[str, ...]) -> None:
    held, program = run_passes(captured, cut), run_passes(captured, cut, forecast=True)
    features = [value.name for value in held.stages["decoder"].inputs if value.time is BindingTime.KEY]
    assert list(program.features_before.values()) == features
    added = program.stages["decoder"].op_counts - held.stages["decoder"].op_counts
    assert added == Counter({op: len(features) for op in FORECAST})
    others = [name for name in program.stages if name != "decoder"]
    assert [program.stages[name].op_counts for name in others] == [held.stages[name].op_counts for name in others]
    decoder = program.stages["decoder"]
    tensors = dict(zip([value.name for value in decoder.inputs], arguments(decoder, 1, 3), strict=True))
    tensors |= {name: tensors[name][0] for name in decoder.stepwise_inputs}
    with torch.no_grad():
        for weight in (-1.9, -0.4, 0.0):
            known = tensors | {FORECAST_WEIGHT: torch.tensor(weight)}
            (actual,) = decoder.graph_module(*(known[value.name] for value in decoder.inputs))
            expected = forecast_outside(held, known)
            torch.testing.assert_close(actual, expected, rtol=0, atol=3e-6 if weight else 0)


def test_all_steps_at_once_equal_one_after_the_other(captured: fx.GraphModule) -> None:
    decoder = run_passes(captured, fdcompile.DECODER, forecast=True).stages["decoder"]
    batched = batch_steps(decoder)
    for steps, batch in ((1, 2), (4, 1), (5, 3)):
        tensors = arguments(decoder, steps, batch)
        with torch.no_grad():
            expected = one_by_one(decoder, tensors, steps)
            torch.testing.assert_close(batched(*tensors)[0], expected, rtol=1e-4, atol=1e-5)


def test_features_before_that_nothing_produced_are_refused() -> None:
    graph_module, _ = toy_graph()
    program = run_passes(graph_module, DECODER, forecast=True)
    del program.stages["encoder"]
    with pytest.raises(VerificationError, match=r"\['conv2d_3', 'conv2d_3_before'\], which nothing before it"):
        verify_program(program)


@pytest.mark.parametrize("cut", [("conv_in", "down_blocks", *DECODER), ("conv_in", "down_blocks", "text", *DECODER)])
def test_without_features_nothing_is_changed(cut: tuple[str, ...]) -> None:
    graph_module, _ = toy_graph()
    program = run_passes(graph_module, cut)
    before = str(program)
    assert not forecast_features(program)
    assert str(program) == before
    assert not program.features_before


def test_other_types_are_kept_and_whole_numbers_are_held() -> None:
    """Features of half precision and of single, and an index that picks from them."""
    graph = fx.Graph()
    tensors = {"single": torch.randn(2, 4), "half": torch.randn(2, 4).half(), "index": torch.tensor([[1], [3]])}
    nodes = {}
    for name, tensor in tensors.items():
        nodes[name] = graph.placeholder(name)
        nodes[name].meta = {"val": tensor}
    picked = graph.call_function(torch.ops.aten.gather.default, (nodes["half"], 1, nodes["index"]))
    graph.output((nodes["single"], picked))
    inputs = tuple(
        TensorSpec(name, tuple(tensor.shape), tensor.dtype, BindingTime.KEY) for name, tensor in tensors.items()
    )
    decoder = Stage(inputs, inputs[:1], "decoder", fx.GraphModule({}, graph))
    program = StagedProgram(inputs, {"decoder": decoder}, "single", fx.GraphModule({}, graph))
    assert forecast_features(program)
    assert program.features_before == {"single_before": "single", "half_before": "half"}
    weights = torch.tensor([-1.0, 0.0])
    run = torch.func.vmap(decoder.graph_module, in_dims=(None,) * 5 + (0,))
    single, half = run(*tensors.values(), torch.zeros(2, 4), torch.zeros(2, 4).half(), weights)
    assert (single.dtype, half.dtype) == (torch.float32, torch.float16)
    assert torch.equal(single, torch.stack([2 * tensors["single"], tensors["single"]]))
    expected = tensors["half"].gather(1, tensors["index"])
    assert torch.equal(half, torch.stack([2 * expected, expected]))
