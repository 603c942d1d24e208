"""Small pipelines with random weights in the real architectures."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

TEXT = (7, 32)
"""Tokens and width of the text that the small UNets are conditioned on."""

BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}


def small_unet(**overrides: Any) -> UNet2DConditionModel:
    """SD 1.5's block types at 3 levels, on 8x8 latents."""
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "cross_attention_dim": TEXT[1],
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        **BLOCKS,
        **overrides,
    }
    return UNet2DConditionModel(**config).eval()


def small_pipe(unet: UNet2DConditionModel | None = None, scheduler: Any = None) -> StableDiffusionPipeline:
    unet = small_unet() if unet is None else unet
    torch.manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                              clip_sample=False, set_alpha_to_one=False) if scheduler is None else scheduler  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: StableDiffusionPipeline, steps: int = 10, batch: int = 1, guidance: float = 5.0, seed: int = 0,
           **kwargs: Any) -> Tensor:  # fmt: skip
    """Final latents of a run with fixed prompts and noise."""
    text = torch.randn(2, batch, *TEXT, generator=torch.Generator().manual_seed(100 + seed))
    arguments = {
        "prompt_embeds": text[0],
        "negative_prompt_embeds": text[1],
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        **kwargs,
    }
    latents: Tensor = pipe(**arguments).images
    return latents
