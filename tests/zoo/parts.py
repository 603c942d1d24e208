"""Components and call arguments that pipelines of several kinds share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from models import TEXT, ddim, small_vae
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import fdcompile

STEPS = 8


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(channels: int = 3, size: int = 8) -> Tensor:
    return torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(3))


def arguments(**more: Any) -> Callable[[], dict[str, Any]]:
    """Steps, a generator and `more`."""

    def make() -> dict[str, Any]:
        torch.manual_seed(0)  # some pipelines draw from the global generator, too
        return {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0)} | more

    return make


def guided(**more: Any) -> Callable[[], dict[str, Any]]:
    """As `arguments`, with a prompt and a negative one."""
    text = {"prompt_embeds": noise(1, *TEXT, seed=1), "negative_prompt_embeds": noise(1, *TEXT, seed=2)}
    return arguments(**text, guidance_scale=5.0, **more)


def image_encoder(kind: type[Any] = CLIPVisionModelWithProjection) -> Any:
    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=TEXT[1],
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return kind(config).eval()


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


def with_text(kind: type[Any], **parts: Any) -> Any:
    """A pipeline of Stable Diffusion's parts without its text encoder; `parts` are added or replaced."""
    return quiet(kind(**{"vae": small_vae(), "text_encoder": None, "tokenizer": None, "scheduler": ddim()} | parts))


@functools.cache
def miniature() -> Any:
    """Provides a tokenizer and a text encoder of width 64."""
    return fdcompile.load_miniature()
