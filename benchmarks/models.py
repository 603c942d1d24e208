"""Models of the benchmarks: real architectures with random weights, and the bundled miniature."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from fdcompile.miniature import WEIGHTS

TOKENS = 77
"""Length of a prompt of Stable Diffusion 1.5 and SDXL."""

MINIATURE_TOKENS = 16

SIZE_CONDITIONS = 6
"""Numbers in the size conditioning of SDXL: original size, crop and target size, two each."""

SD15: Mapping[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
}

SDXL: Mapping[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + SIZE_CONDITIONS * 256,
}

MINIATURE: Mapping[str, Any] = json.loads((WEIGHTS / "unet" / "config.json").read_text(encoding="utf-8"))

SMALL: Mapping[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "transformer_layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
"""Two levels with one layer per block, quick to compile. Merged over the others it keeps their conditioning."""


def narrow(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the same blocks with 32 channels and one transformer layer each, for 8x8 latents: quick to run."""
    levels = len(config["block_out_channels"])
    return {
        **config,
        "sample_size": 8,
        "block_out_channels": (32,) * levels,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "transformer_layers_per_block": 1,
    }


def random_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Makes a UNet with random weights on the default device."""
    torch.manual_seed(0)
    return UNet2DConditionModel(**config).eval()


def pooled_width(config: Any) -> int | None:
    """Returns the width of the pooled prompt embedding of an SDXL UNet; None for other UNets."""
    if config.addition_embed_type != "text_time":
        return None
    return int(config.projection_class_embeddings_input_dim - SIZE_CONDITIONS * config.addition_time_embed_dim)


def random_pipe(unet: UNet2DConditionModel) -> Any:
    """Makes a stock pipeline around `unet` without text encoder and VAE, from prompt embeddings to latents."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "unet": unet, "scheduler": scheduler}
    if pooled_width(unet.config) is not None:
        return StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
    checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **checker)


def random_prompts(unet: UNet2DConditionModel, batch: int) -> dict[str, torch.Tensor]:
    """Makes random prompt embeddings as arguments of a pipeline call for `batch` prompts."""
    generator = torch.Generator().manual_seed(1)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(batch, *size, generator=generator).to(unet.device, unet.dtype)

    width = unet.config.cross_attention_dim
    prompts = {"prompt_embeds": draw(TOKENS, width), "negative_prompt_embeds": draw(TOKENS, width)}
    pooled = pooled_width(unet.config)
    if pooled is not None:
        prompts |= {"pooled_prompt_embeds": draw(pooled), "negative_pooled_prompt_embeds": draw(pooled)}
    return prompts
