"""The memory format of a UNet's convolution kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from fdcompile.graph.weights import is_channels_last

_turned: Any = WeakIdKeyDictionary()
"""The kernels that were contiguous."""


def to_channels_last(unet: nn.Module) -> None:
    """Lays out the contiguous kernels of the 2-d convolutions of `unet` channels-last, in place.

    That is the layout in which cuDNN's tensor core kernels compute in half precision. All that is made of the weights
    keeps it: eager kernels, compiled code whose sizes are symbolic, where inductor does not choose a layout itself,
    AOTInductor's, and dense parts of weights. Parameters stay the same objects and have the same values.
    """
    for module in unet.modules():
        weight = module.weight if isinstance(module, nn.Conv2d) else None
        if type(weight) is nn.Parameter and weight.is_contiguous() and not is_channels_last(weight):
            # A kernel of one pixel is both already, and its strides say which one it counts as.
            weight.data = weight.data.clone(memory_format=torch.channels_last)
            _turned[weight] = True


def restore_layout(unet: nn.Module) -> None:
    """Undoes `to_channels_last`."""
    for weight in unet.parameters():
        if _turned.pop(weight, False):
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)


@contextmanager
def channels_last(unet: nn.Module, restore: bool) -> Iterator[None]:
    """Within it the layout is that of `to_channels_last`; afterwards it is as before if `restore`."""
    to_channels_last(unet)
    try:
        yield
    finally:
        if restore:
            restore_layout(unet)
