"""Memory format of a UNet's convolution weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from fdcompile.graph.weights import is_channels_last

_turned: Any = WeakIdKeyDictionary()
"""Weights that were contiguous."""


def to_channels_last(unet: nn.Module) -> None:
    """Converts contiguous weights of the 2-d convolutions of `unet` to channels-last, in place.

    cuDNN's tensor core kernels compute in this layout in half precision. Eager kernels, code compiled with symbolic
    sizes (where inductor does not choose a layout itself), AOTInductor's code and dense parts of weights keep it.
    Parameters stay the same objects with the same values.
    """
    for module in unet.modules():
        weight = module.weight if isinstance(module, nn.Conv2d) else None
        if type(weight) is nn.Parameter and weight.is_contiguous() and not is_channels_last(weight):
            # A 1x1 kernel has both layouts, and its strides decide which one torch sees.
            weight.data = weight.data.clone(memory_format=torch.channels_last)
            _turned[weight] = True


def restore_layout(unet: nn.Module) -> None:
    """Undoes `to_channels_last`."""
    for weight in unet.parameters():
        if _turned.pop(weight, False):
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)


@contextmanager
def channels_last(unet: nn.Module, restore: bool) -> Iterator[None]:
    """Applies `to_channels_last` within the block, and undoes it afterwards if `restore` is set."""
    to_channels_last(unet)
    try:
        yield
    finally:
        if restore:
            restore_layout(unet)
