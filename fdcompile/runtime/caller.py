"""What a pipeline says of the call that it is in."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import Tensor, nn

from fdcompile.runtime.host_copies import HostCopies

Guidance = tuple[float, float]
"""Smallest and largest guidance scale of a call."""


class Caller:
    """The pipeline whose call is under way.

    Args:
        pipe: a pipeline, or whatever holds the UNet and the scheduler of a sampling loop.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._copies = HostCopies()

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
        """Of the call that the pipeline is in or has made last; None if it says none."""
        scale = getattr(self._pipe, "guidance_scale", None)
        if isinstance(scale, Tensor):  # one a frame
            scales = self.values(scale)
            return min(scales), max(scales)
        return (float(scale), float(scale)) if isinstance(scale, int | float) else None

    def read_ahead(self, timesteps: Tensor) -> None:
        """Reads what a run asks for: its `timesteps`, noise levels and guidance. Waits for the device once."""
        told = (getattr(self.scheduler, name, None) for name in ("sigmas", "alphas_cumprod"))
        known = (timesteps, *told, getattr(self._pipe, "guidance_scale", None))
        self._copies.read(*(tensor for tensor in known if isinstance(tensor, Tensor)))

    def values(self, tensor: Tensor) -> list[float]:
        """What is in `tensor`, flat. Waits for the device where it was not read ahead, or was written to since."""
        return self._copies.values(tensor)

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


def unwrap(unet: Any) -> Any:
    """`unet` without what ``torch.compile`` has put around it."""
    return getattr(unet, "_orig_mod", unet)
