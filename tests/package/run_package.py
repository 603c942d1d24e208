"""Run by a test in a process of its own: load a package into a pipeline, draw, and write what was drawn."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

import fdcompile

PROMPTS = ["two red circles", "a blue square"]


def small() -> Any:
    """The miniature with a UNet of one level and random weights, which is sooner compiled."""
    pipe = fdcompile.load_miniature()
    one_level = {
        "block_out_channels": (16,),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "mid_block_type": None,
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, **one_level}).eval()
    return pipe


MODELS = {"small": small, "miniature": fdcompile.load_miniature}


def draw(pipe: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPTS, num_inference_steps=20, guidance_scale=3.0, generator=generator, output_type="np").images


if __name__ == "__main__":
    model, package, output = sys.argv[1:]
    pipe = fdcompile.load(MODELS[model](), package)
    pictures = draw(pipe)
    report = fdcompile.explain(pipe)
    assert report.full_calls == 0, report
    assert report.encoder_runs < report.decoder_evaluations, report
    np.save(output, pictures)
