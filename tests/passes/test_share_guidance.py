"""share_guidance: what the copies of a latent have in common is found, and nothing else."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from models import assert_equal, sample
from torch import Tensor, fx, nn
from toy import DECODER, ops, toy_graph

import fdcompile
from fdcompile import Config
from fdcompile.capture.call import UNetCall
from fdcompile.capture.export import capture
from fdcompile.graph.program import BindingTime, StagedProgram
from fdcompile.graph.text import graph_text
from fdcompile.passes import OPTIONAL_PASSES, PASSES, run_passes
from fdcompile.passes.bind import bind
from fdcompile.passes.share_guidance import share_guidance
from fdcompile.passes.simplify import simplify

WITHOUT = tuple(step for step in PASSES if step.name != "share_guidance")


def labels(graph_module: fx.GraphModule) -> dict[str, str]:
    named = {BindingTime.SHARED, BindingTime.KEY, BindingTime.LATENT}
    nodes = [node for node in graph_module.graph.nodes if node.meta.get("binding_time") in named]
    return {node.name: str(node.meta["binding_time"]) for node in nodes}


def bound(unet: nn.Module, *positional: Tensor) -> fx.GraphModule:
    call = UNetCall.parse(inspect.signature(unet.forward), positional, {})
    graph_module = capture(unet, call)
    simplify(graph_module)
    bind(graph_module, DECODER)
    return graph_module


class Prompted(nn.Module):
    """An encoder of two convolutions, a prompt added to the second, and a third one; `mix` stands between the first."""

    def __init__(self, mix: Any = None) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(2, 4, 1)
        self.down_blocks = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
        self.conv_out = nn.Conv2d(4, 2, 1)
        self._mix = mix

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        h = self.conv_in(sample)
        h = self._mix(h) if self._mix else h
        h = self.down_blocks[0](h) * timestep[:, None, None, None]
        h = self.down_blocks[1](h + text[:, :, None, None])
        return (self.conv_out(h + timestep[:, None, None, None]),)


INPUTS = torch.randn(4, 2, 4, 4), torch.tensor(5), torch.randn(4, 4)


def test_golden(golden: Any) -> None:
    graph_module = bound(Prompted(), *INPUTS)
    before = ops(graph_module)
    assert share_guidance(graph_module, DECODER)
    assert ops(graph_module) == before
    golden("share_guidance", graph_text(graph_module))


@pytest.mark.parametrize(
    "mix",
    [
        lambda h: h.flip(0),
        lambda h: h - h.mean(dim=0, keepdim=True),
        lambda h: h.unsqueeze(0).flip(1).squeeze(0),
        lambda h: h + torch.arange(h.shape[0])[:, None, None, None],
        lambda h: h.transpose(0, 1).contiguous().transpose(0, 1).cumsum(0),
    ],
)
def test_what_reads_another_entry_of_the_batch_ends_the_stage(mix: Any) -> None:
    graph_module = bound(Prompted(mix), *INPUTS)
    assert not share_guidance(graph_module, DECODER), "conv_in alone is left, which is not worth a stage"
    assert "key, shared" not in labels(graph_module).values()


def test_no_change_where_the_prompt_comes_first() -> None:
    class Conditioned(Prompted):
        def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, return_dict: bool = False) -> tuple[Tensor]:
            return super().forward(sample + text.mean(), timestep, text)

    assert not share_guidance(bound(Conditioned(), *INPUTS), DECODER)


def test_in_a_real_unet_it_reaches_the_first_cross_attention(captured: fx.GraphModule, staged: StagedProgram) -> None:
    stage = staged.stages["shared"]
    counts = stage.op_counts
    assert counts["aten.scaled_dot_product_attention.default"] == 1
    assert not [value for value in stage.inputs if value.time in (BindingTime.PROMPT, BindingTime.SCHEDULE_PROMPT)]
    assert sum(stage.flops(2) for stage in staged.stages.values()) == sum(
        stage.flops(2) for stage in run_passes(captured, fdcompile.DECODER, WITHOUT).stages.values()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_a_batch_repeated_equals_the_batch(dtype: torch.dtype) -> None:
    graph_module, _ = toy_graph()
    program = run_passes(graph_module, DECODER)
    stage = program.stages["shared"]
    module = stage.graph_module.to(dtype)
    latent, time = torch.randn(2, 2, 4, 4, dtype=dtype), torch.randn(2, 4, 1, 1, dtype=dtype)
    by_name = {"sample": latent, stage.inputs[1].name: time}
    one = [by_name[value.name] for value in stage.inputs]
    with torch.no_grad():
        whole = module(*(tensor.repeat(2, 1, 1, 1) for tensor in one))
        for actual, expected in zip(module(*one), whole, strict=True):
            torch.testing.assert_close(actual.repeat(2, 1, 1, 1), expected)


def test_it_runs_for_one_copy_where_the_pipeline_stacked_copies(pipe: Any) -> None:
    cases = [(5.0, 1, 0.5), (5.0, 3, 0.5), (1.0, 2, 1.0)]
    config = {"key_steps": (0, 2, 4)}
    fdcompile.optimize(pipe, Config(**config, disabled_passes=OPTIONAL_PASSES))
    expected = [sample(pipe, steps=6, batch=batch, guidance=guidance) for guidance, batch, _ in cases]
    fdcompile.optimize(pipe, Config(**config))
    for own, (guidance, batch, share) in zip(expected, cases, strict=True):
        assert_equal(sample(pipe, steps=6, batch=batch, guidance=guidance), own)
        report = fdcompile.explain(pipe)
        (program,) = report.programs
        latents = batch * (2 if guidance > 1 else 1)
        assert report.stage_flops["shared"] == 3 * share * program.stages["shared"].flops(latents)
        assert report.pass_flops["share_guidance"] == 3 * (1 - share) * program.stages["shared"].flops(latents)


def test_copies_that_differ_later_are_computed_apart(pipe: Any, stock: Any) -> None:
    """A callback of the scheduler's step changes one latent: seen at the next key step."""
    fdcompile.optimize(pipe, Config(key_steps="all"))
    text = torch.randn(2, 7, 32)
    timesteps = []
    for one in (pipe, stock):
        one.scheduler.set_timesteps(4)
        timesteps.append(one.scheduler.timesteps)
    latents = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1)
    for step in range(4):
        if step == 2:
            latents = latents * torch.tensor([1.0, 2.0])[:, None, None, None]
        with torch.no_grad():
            actual, expected = (
                one.unet(latents, times[step], encoder_hidden_states=text).sample
                for one, times in zip((pipe, stock), timesteps, strict=True)
            )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        latents = latents + 0.1 * latents.roll(1, -1)


def test_it_can_be_turned_off() -> None:
    graph_module, _ = toy_graph()
    config = Config(disabled_passes=("share_guidance",))
    assert "shared" not in run_passes(graph_module, DECODER, config.passes).stages
