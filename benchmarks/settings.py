"""Settings of `make bench`: model, size, batch, precision and steps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.models import MINIATURE, SD15, SDXL, SMALL
from fdcompile.key_steps import Choice

UNETS = {"SD 1.5": SD15, "SDXL": SDXL, "miniature": MINIATURE}


@dataclass(frozen=True)
class Setting:
    """A stock run that candidates are compared with.

    Attributes:
        model: a key of `UNETS`.
        latents: height and width of the latents.
        compiled: whether candidates that need torch.compile are included.
        small: whether the model is reduced to two narrow levels, for dry runs.
    """

    model: str
    latents: int
    batch: int
    steps: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    key_steps: Choice = "paper"
    compiled: bool = True
    small: bool = False

    @property
    def trained(self) -> bool:
        return self.model == "miniature"

    @property
    def unet(self) -> Mapping[str, Any]:
        return {**UNETS[self.model], **SMALL} if self.small else UNETS[self.model]

    def __str__(self) -> str:
        model = self.model if self.trained else f"{self.model} shape, random weights"
        small = ", small" if self.small else ""
        dtype = str(self.dtype).removeprefix("torch.")
        size = f"{self.latents}x{self.latents}"
        return f"{model}{small}, {size}, batch {self.batch}, {dtype}, {self.steps} steps"


def settings(dry: bool) -> list[Setting]:
    """Returns the settings for this machine; with `dry` those of a CUDA device, small and on a CPU."""
    matrix = [
        Setting(model, latents, batch, steps, dtype, "cuda")
        for (model, latents), batch, dtype, steps in itertools.product(
            (("SD 1.5", 64), ("SDXL", 128)), (1, 4), (torch.bfloat16, torch.float16), (20, 50)
        )
    ]
    if dry:
        return [replace(entry, device="cpu", latents=8, small=True, steps=entry.steps // 3) for entry in matrix]
    if torch.cuda.is_available():
        return [Setting("miniature", 16, 4, 50, device="cuda"), *matrix]
    return [
        # One key step in 6, about the paper's ratio of 9 in 50, in a run that is short enough to repeat.
        Setting("SD 1.5", 16, 1, 6, key_steps=6),
        Setting("miniature", 16, 4, 50, compiled=False),
    ]
