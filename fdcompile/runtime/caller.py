"""What a pipeline says of the call that it is in."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import Tensor, nn

Guidance = tuple[float, float]
"""Smallest and largest guidance scale of a call."""


class Caller:
    """The pipeline whose call is under way.

    Args:
        pipe: a pipeline, or whatever holds the UNet and the scheduler of a sampling loop.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    @property
    def scheduler(self) -> Any:
        return self._pipe.scheduler

    @property
    def announced_steps(self) -> int | None:
        """How many steps a pipeline that stops early (``denoising_end``) has said it will run."""
        stops_early = getattr(self._pipe, "_denoising_end", None) is not None
        return getattr(self._pipe, "_num_timesteps", None) if stops_early else None

    @property
    def guidance(self) -> Guidance | None:
        """None where the pipeline does not say. A scale for each frame is read back from the device."""
        return guidance_of(self._pipe)

    @classmethod
    def of(cls, unet: nn.Module, fallback: Any) -> Caller:
        """The pipeline that is calling `unet`; `fallback` if the call comes from elsewhere.

        Pipelines may share a UNet and a scheduler, and copies of a pipeline share all, so that only the stack tells.
        """
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_varnames[:1] == ("self",) and frame.f_code.co_argcount:
                candidate = frame.f_locals.get("self")
                held = getattr(candidate, "__dict__", {})
                if unwrap(held.get("unet")) is unet and held.get("scheduler") is not None:
                    return cls(candidate)
            frame = frame.f_back
        return cls(fallback)


def guidance_of(pipe: Any) -> Guidance | None:
    """Smallest and largest guidance scale of the call that `pipe` is in or has made last; None if it says none."""
    scale = getattr(pipe, "guidance_scale", None)
    if isinstance(scale, Tensor):  # one a frame
        return scale.min().item(), scale.max().item()
    return (float(scale), float(scale)) if isinstance(scale, int | float) else None


def unwrap(unet: Any) -> Any:
    """`unet` without what ``torch.compile`` has put around it."""
    return getattr(unet, "_orig_mod", unet)
