"""A pipeline to optimize, and how to run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One pipeline in its real architecture, small and with random weights.

    Attributes:
        build: makes the pipeline on the CPU in float32, with the same weights each time.
        arguments: makes the arguments of one run, anew for each run because a run advances its generator and may change
            its lists. More than five steps, because with five or fewer every step is a key step.
        output: extracts the tensor to compare from the return value of the pipeline.
        stock: part of the reason why this pipeline runs the stock UNet at some steps; None if it never does.
    """

    build: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]]
    output: Callable[[Any], Tensor] = lambda result: torch.as_tensor(result[0])
    stock: str | None = None

    def run(self, pipe: Any, **changes: Any) -> Tensor:
        return self.output(pipe(**self.arguments() | {"return_dict": False} | changes))
