"""The pipeline that is calling the UNet, and the settings of its call."""

from __future__ import annotations

import sys
import traceback
from typing import Any

from torch import Tensor, nn

from fdcompile.runtime.host_copies import HostCopies

Guidance = tuple[float, float]
"""Smallest and largest guidance scale of a call."""


class Caller:
    """The pipeline that is calling the UNet.

    Args:
        pipe: a pipeline, or any object that holds the UNet and the scheduler of a sampling loop.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._copies = HostCopies()

    @property
    def scheduler(self) -> Any:
        return self._pipe.scheduler

    @property
    def announced_steps(self) -> int | None:
        """Number of steps that a pipeline with ``denoising_end`` set will run; None for other pipelines."""
        stops_early = getattr(self._pipe, "_denoising_end", None) is not None
        return getattr(self._pipe, "_num_timesteps", None) if stops_early else None

    @property
    def guidance(self) -> Guidance | None:
        """Guidance of the current or last call of the pipeline; None if it has no guidance scale."""
        scale = getattr(self._pipe, "guidance_scale", None)
        if isinstance(scale, Tensor):  # one a frame
            scales = self.values(scale)
            return min(scales), max(scales)
        return (float(scale), float(scale)) if isinstance(scale, int | float) else None

    def read_ahead(self, timesteps: Tensor) -> None:
        """Copies the `timesteps`, noise levels and guidance of a run to the host, with one device synchronization."""
        levels = (getattr(self.scheduler, name, None) for name in ("sigmas", "alphas_cumprod"))
        values = (timesteps, *levels, getattr(self._pipe, "guidance_scale", None))
        self._copies.read(*(value for value in values if isinstance(value, Tensor)))

    def values(self, tensor: Tensor) -> list[float]:
        """Values of `tensor`, flattened. Synchronizes unless they were read ahead and not written to since."""
        return self._copies.values(tensor)

    @classmethod
    def of(cls, unet: nn.Module, fallback: Any) -> Caller:
        """Finds the pipeline that is calling `unet` on the call stack; `fallback` if there is none.

        Pipelines may share a UNet and a scheduler, and copies of a pipeline share both, so only the stack identifies
        the caller.
        """
        for frame, _ in traceback.walk_stack(sys._getframe(1)):
            if frame.f_code.co_varnames[:1] == ("self",) and frame.f_code.co_argcount:
                candidate = frame.f_locals.get("self")
                held = getattr(candidate, "__dict__", {})
                if unwrap(held.get("unet")) is unet and held.get("scheduler") is not None:
                    return cls(candidate)
        return cls(fallback)


def unwrap(unet: Any) -> Any:
    """Returns the module inside the wrapper of ``torch.compile``, or `unet` itself if it has none."""
    return getattr(unet, "_orig_mod", unet)
