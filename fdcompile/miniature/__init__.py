"""A small trained Stable Diffusion, shipped with the package: see MODEL_CARD.md in this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

    from fdcompile.miniature.scenes import Scene

WEIGHTS = Path(__file__).parent / "weights"

GUIDANCE = 3.0
"""Guidance scale recommended by the model card."""

PLANS = Path(__file__).parent / "plans"
"""Plans for the miniature, made by ``fdcompile plan``; see the model card."""


def load_miniature(dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """Loads the miniature as a stock diffusers pipeline for 32x32 images, from package data.

    The weights are stored in half precision and converted to `dtype`, by default float32.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    pipe: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(
        WEIGHTS, dtype=dtype or torch.float32, local_files_only=True
    )
    return pipe


def is_miniature(pipe: Any) -> bool:
    """Whether `pipe` was loaded from the weights of the package."""
    return str(getattr(pipe, "name_or_path", "")) == str(WEIGHTS)


def scenes_of(pipe: Any, prompts: Sequence[str]) -> list[Scene] | None:
    """The scenes that `prompts` describe; None if `pipe` is not the miniature, or a prompt is no caption of its own."""
    from fdcompile.miniature.scenes import parse_caption

    try:
        return [parse_caption(prompt) for prompt in prompts] if is_miniature(pipe) else None
    except ValueError:
        return None
