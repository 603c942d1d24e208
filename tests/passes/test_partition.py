"""partition: the stages, their interfaces, and that together they are the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from toy import DECODER, Toy, ops, toy_call, toy_graph

import fdcompile
from fdcompile.graph.program import StagedProgram
from fdcompile.graph.text import graph_text
from fdcompile.passes import PASSES, run_passes

BIT_FOR_BIT = tuple(step for step in PASSES if not step.optional)
"""The passes without those that sum in another order."""


def run_stages(program: StagedProgram, inputs: tuple[Tensor, ...]) -> Tensor:
    known = dict(zip((value.name for value in program.inputs), inputs, strict=True))
    for stage in program.stages.values():
        outputs = stage.graph_module(*(known[value.name] for value in stage.inputs))
        known.update(zip((value.name for value in stage.outputs), outputs, strict=True))
    return known[program.output]


def test_golden(golden: Any) -> None:
    graph_module, _ = toy_graph()
    program = run_passes(graph_module, DECODER)
    stages = (f"# {name}\n{graph_text(stage.graph_module)}" for name, stage in program.stages.items())
    golden("partition", "\n\n".join([str(program), *stages]))


@pytest.mark.parametrize(
    ("cut", "stages", "parallel"),
    [
        (DECODER, ["schedule", "prompt", "encoder", "decoder"], True),
        (("conv_in", *DECODER), ["schedule", "prompt", "shallow", "encoder", "decoder"], False),
        ((), ["schedule", "prompt", "encoder"], True),
        (("conv_in", "down_blocks", *DECODER), ["schedule", "prompt", "shallow"], False),
        # The reused decoder block reads a recomputed encoder block, which reads the reused conv_in: none is per step.
        (("down_blocks", "conv_out"), ["schedule", "prompt", "encoder"], True),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_stages_equal_the_unet(cut: tuple[str, ...], stages: list[str], parallel: bool, batch: int) -> None:
    graph_module, _ = toy_graph()
    before = str(graph_module.graph)
    program = run_passes(graph_module, cut, BIT_FOR_BIT)
    assert str(graph_module.graph) == before, "the captured graph is left as it was"
    assert list(program.stages) == stages
    assert program.parallel is parallel
    inputs = toy_call(Toy(), batch).tensors
    torch.testing.assert_close(run_stages(program, inputs), graph_module(*inputs)[0], rtol=0, atol=0)


@pytest.mark.parametrize("cut", [fdcompile.DECODER, fdcompile.PARTIAL_ENCODER, fdcompile.deep_feature_caching(3), ()])
@pytest.mark.parametrize("batch", [1, 5])
def test_stages_equal_a_real_unet(captured: fx.GraphModule, unet: Any, cut: tuple[str, ...], batch: int) -> None:
    program = run_passes(captured, cut, BIT_FOR_BIT)
    x, text, t = torch.randn(batch, 4, 8, 8), torch.randn(batch, 7, 32), torch.full((batch,), 250)
    by_name = {"sample": x, "timestep": t, "encoder_hidden_states": text}
    with torch.no_grad():
        expected = unet(x, t, encoder_hidden_states=text).sample
        actual = run_stages(program, tuple(by_name[value.name] for value in program.inputs))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_stage_does_not_need_the_latent_for_its_shape(staged: StagedProgram) -> None:
    decoder = staged.stages["decoder"]
    assert "sym_size.int" in ops(decoder.graph_module)
    assert "sample" not in [value.name for value in decoder.inputs]


def test_stages_share_the_unets_weights(staged: StagedProgram, unet: Any) -> None:
    weights = {id(parameter) for parameter in unet.parameters()}
    for stage in staged.stages.values():
        assert {id(parameter) for parameter in stage.graph_module.parameters()} <= weights


def test_cross_attention_and_time_projections_are_hoisted(staged: StagedProgram) -> None:
    hoisted = staged.hoisted
    assert len([path for path in hoisted["prompt"] if path.endswith(("attn2.to_k", "attn2.to_v"))]) == 2 * 7
    assert len([path for path in hoisted["schedule"] if path.endswith("time_emb_proj")]) == 3 + 2 + 6
    assert {"up_blocks.0.resnets.0.conv1", "up_blocks.0.resnets.0.conv_shortcut"} <= set(hoisted["encoder"])
