"""Run by a test in a process of its own: load a package into a pipeline, draw, and write what was drawn."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

import fdcompile

PROMPTS = ["two red circles", "a blue square"]


def small() -> Any:
    """The miniature with a UNet of one level, with attention in its encoder, and random weights: sooner compiled."""
    pipe = fdcompile.load_miniature()
    one_level = {
        "block_out_channels": (16,),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D",),
    }
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, **one_level}).eval()
    return pipe


def large() -> Any:
    """Images of several hundred pixels, of 8 to a latent; the UNet halves twice."""
    pipe = fdcompile.load_miniature()
    torch.manual_seed(0)
    levels = {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "attention_head_dim": 2}
    vae = {
        "block_out_channels": (4,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 2,
        "mid_block_add_attention": False,
    }
    parts = {
        "unet": UNet2DConditionModel.from_config({**pipe.unet.config, **levels}).eval(),
        "vae": AutoencoderKL.from_config({**pipe.vae.config, **vae}).eval(),
    }
    return type(pipe)(**{**pipe.components, **parts}, requires_safety_checker=False)


MODELS = {"small": small, "planned": small, "miniature": fdcompile.load_miniature, "large": large}
SIZES: dict[str, list[dict[str, int]]] = {
    "small": [{}, {"height": 48, "width": 16}],
    "large": [{"height": 256, "width": 256}, {"height": 320, "width": 768}, {"height": 512, "width": 448}],
}


def draw(pipe: Any, steps: int = 20, **size: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": steps, "guidance_scale": 3.0, "generator": generator, "output_type": "np"}
    return pipe(PROMPTS, **arguments, **size).images


def draw_all(pipe: Any, model: str = "small") -> list[np.ndarray]:
    """Images of all sizes that `model` is drawn at."""
    return [draw(pipe, 8 if model == "large" else 20, **size) for size in SIZES.get(model, [{}])]


if __name__ == "__main__":
    model, package, output = sys.argv[1:]
    pipe = fdcompile.load(MODELS[model](), package)
    images = draw_all(pipe, model)
    report = fdcompile.explain(pipe)
    assert report.stock_calls == 0, report
    assert report.encoder_runs < report.decoder_evaluations, report
    np.savez(output, *images)
