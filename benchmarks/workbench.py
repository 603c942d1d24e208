"""One pipeline that becomes each variant of a benchmark in turn."""

from __future__ import annotations

from typing import Any

from fdcompile import optimize, restore
from fdcompile.measure.variant import Variant, scheduler_of
from fdcompile.pipeline.clone import clone


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
