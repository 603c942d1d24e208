"""Pipelines that call their UNet in other ways than Stable Diffusion's text-to-image does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from models import TEXT, sample, small_pipe, small_xl_pipe
from torch import Tensor

import fdcompile
from fdcompile import Config

PIPELINES = {
    "sdxl": (small_xl_pipe, {}),
    "img2img": (lambda: small_pipe(StableDiffusionImg2ImgPipeline), {"strength": 0.6, "steps": 20}),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline(name: str) -> None:
    build, arguments = PIPELINES[name]
    pipe = build()
    expected = sample(pipe, batch=2, **arguments)
    tolerance = 1e-4 * expected.abs().max().item()

    fdcompile.optimize(pipe, Config(key_steps="all"))
    torch.testing.assert_close(sample(pipe, batch=2, **arguments), expected, rtol=0, atol=tolerance)

    fdcompile.optimize(pipe, Config.paper(max_parallel_steps=1))
    sequential = sample(pipe, batch=2, **arguments)
    fdcompile.optimize(pipe, Config.paper(max_parallel_steps=16))
    torch.testing.assert_close(sample(pipe, batch=2, **arguments), sequential, rtol=0, atol=tolerance)
    report = fdcompile.explain(pipe)
    assert report.stock_calls == 0
    assert report.encoder_runs == report.decoder_calls < report.decoder_evaluations == report.num_steps
    assert report.flops < report.stock_flops

    fdcompile.restore(pipe)
    assert torch.equal(sample(pipe, batch=2, **arguments), expected)


def test_img2img_counts_steps_from_the_first_it_runs() -> None:
    pipe = fdcompile.optimize(small_pipe(StableDiffusionImg2ImgPipeline), Config(key_steps=(0, 4)))
    sample(pipe, strength=0.5, steps=20)
    report = fdcompile.explain(pipe)
    assert (report.num_steps, report.key_steps, report.groups) == (10, (0, 4), ((0, 4), (4, 10)))


def test_img2img_does_not_reach_later_key_steps() -> None:
    pipe = fdcompile.optimize(small_pipe(StableDiffusionImg2ImgPipeline), Config(key_steps=(0, 3, 7)))
    sample(pipe, strength=0.6, steps=10)
    report = fdcompile.explain(pipe)
    assert (report.num_steps, report.key_steps, report.groups) == (6, (0, 3), ((0, 3), (3, 6)))


def test_sdxl_computes_its_embedding_once_for_all_steps() -> None:
    pipe = fdcompile.optimize(small_xl_pipe(), Config.paper())
    sample(pipe)
    (program,) = fdcompile.explain(pipe).programs
    hoisted = program.hoisted
    assert "time_embedding.linear_1" in hoisted["schedule"]
    assert "add_embedding.linear_1" in hoisted["prompt"]
    assert "down_blocks.0.resnets.0.time_emb_proj" in hoisted["schedule_prompt"]


def test_lanes_several_unet_calls_a_step(pipe: Any, stock: Any) -> None:
    """A loop that calls the UNet once for each half of classifier-free guidance, instead of once for both."""

    def run(pipe: Any) -> Tensor:
        texts = torch.randn(2, 1, *TEXT, generator=torch.Generator().manual_seed(4)).unbind()
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        pipe.scheduler.set_timesteps(12)
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                without, with_text = (pipe.unet(latents, t, encoder_hidden_states=text).sample for text in texts)
                latents = pipe.scheduler.step(without + 5 * (with_text - without), t, latents).prev_sample
        return latents

    expected = run(stock)
    fdcompile.optimize(pipe, Config(key_steps="all"))
    torch.testing.assert_close(run(pipe), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    fdcompile.optimize(pipe, Config(key_steps=(0, 1, 4, 8)))
    propagated = run(pipe)
    report = fdcompile.explain(pipe)
    assert report.forced_key_steps == ()
    assert (report.encoder_runs, report.decoder_evaluations) == (2 * 4, 2 * 12)
    fdcompile.optimize(pipe, Config(key_steps=(0, 1, 4, 8), max_parallel_steps=1))
    torch.testing.assert_close(run(pipe), propagated, rtol=0, atol=1e-4 * expected.abs().max().item())
