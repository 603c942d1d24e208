"""A pipeline to be optimised, and how to run it."""

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
        build: makes the pipeline, the same one each time, on the CPU and in float32.
        arguments: of one run, made anew for each: generators and lists are used up. It has a few more than five steps,
            because at five or fewer every step is a key step.
        output: takes the tensor that runs are compared by out of what the pipeline returned.
        stock: what the reason says, with which this pipeline runs the stock UNet at some steps; None: it never does.
    """

    build: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]]
    output: Callable[[Any], Tensor] = lambda result: torch.as_tensor(result[0])
    stock: str | None = None

    def run(self, pipe: Any, **changes: Any) -> Tensor:
        return self.output(pipe(**self.arguments() | {"return_dict": False} | changes))
