"""One pipeline that becomes each variant of a benchmark in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fdcompile import optimize, restore
from fdcompile.measure.calls import Call, OutputHook, run_call
from fdcompile.measure.cost import count_work
from fdcompile.measure.metrics import Images
from fdcompile.measure.variant import Variant, scheduler_of
from fdcompile.pipeline.clone import clone


@dataclass(frozen=True)
class Made:
    """Images of a variant.

    Attributes:
        images: the images, uint8 ``[images, height, width, 3]``.
        flops: FLOPs of the UNet per image.
        unet_calls: calls of the stock UNet, or encoder runs, in one run of the sampler.
    """

    images: Images
    flops: float
    unet_calls: int


class Workbench:
    """Makes variants of a stock pipeline one after the other; they share their captured graphs.

    Attributes:
        stock: the stock pipeline; nothing of it is changed but that its progress bars are disabled.
    """

    def __init__(self, pipe: Any) -> None:
        pipe.set_progress_bar_config(disable=True)
        self.stock = pipe
        self._shared = clone(pipe)

    def pipe(self, variant: Variant) -> Any:
        """Returns a pipeline that runs `variant`, valid until the next call."""
        if variant.patch is not None:
            restore(self._shared)  # so that both do not take memory at once
            return variant.of(self.stock)
        self._shared.scheduler = scheduler_of(self.stock, variant.sampler)
        return restore(self._shared) if variant.config is None else optimize(self._shared, variant.config)

    def run(self, variant: Variant, calls: Sequence[Call], output_hook: OutputHook | None = None) -> Made:
        """Makes the images of `calls`, and counts the work of the first one."""
        pipe = self.pipe(variant)
        first, work = count_work(pipe, lambda: run_call(pipe, calls[0], output_hook).images)
        rest = [run_call(pipe, call, output_hook).images for call in calls[1:]]
        return Made(np.concatenate([first, *rest]), work.flops / len(first), work.unet_calls)
