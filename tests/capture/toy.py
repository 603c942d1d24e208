"""A small module with one attention, and attention processors that read something."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from fdcompile.capture.call import UNetCall
from fdcompile.runtime.graph_cache import GraphCache


class Toy(nn.Module):
    """Takes what a UNet takes, and holds one attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(4, heads=1, dim_head=4)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        tokens = self.attention(sample.flatten(2).transpose(1, 2))
        return (sample + timestep.reshape(-1, 1, 1, 1) * tokens.transpose(1, 2).reshape(sample.shape),)


def call() -> UNetCall:
    tensors = torch.randn(2, 4, 4, 4), torch.tensor(7.0)
    return UNetCall.parse(inspect.signature(Toy().forward), tensors, {"encoder_hidden_states": torch.randn(2, 3, 4)})


def capture(unet: nn.Module) -> GraphCache:
    graph_cache = GraphCache(unet)
    graph_cache.follow_unet()
    graph_cache.capture(call())
    return graph_cache


class Counter:
    def __init__(self) -> None:
        self.n = 0


GLOBAL = Counter()


class Reading(AttnProcessor2_0):
    """Scales by what is in `store`."""

    def __init__(self, store: Any) -> None:
        super().__init__()
        self.store = store

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().__call__(*args, **kwargs) * (1 + self.factor())

    def factor(self) -> Any:
        return self.store[0]

    def write(self, value: int) -> None:
        self.store[0] = value


class ReadingAnObject(Reading):
    def factor(self) -> Any:
        return self.store.n

    def write(self, value: int) -> None:
        self.store.n = value


class Elsewhere(Reading):
    """Reads with a function."""

    def __init__(self, read: Callable[[], Any]) -> None:
        super().__init__(None)
        self.read = read

    def factor(self) -> Any:
        return self.read()
