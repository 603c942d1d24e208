"""Calls of the small pipelines, which have no text encoder."""

from __future__ import annotations

from typing import Any

import torch
from models import TEXT


def call(seed: int, steps: int, **given: Any) -> dict[str, Any]:
    """Keyword arguments with a prompt and noise of their own."""
    text = torch.randn(2, 1, *TEXT, generator=torch.Generator().manual_seed(100 + seed))
    return {
        "prompt_embeds": text[0],
        "negative_prompt_embeds": text[1],
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        **given,
    }
