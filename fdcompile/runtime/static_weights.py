"""What follows from a UNet's weights alone: dense copies of the parts that its stages read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from fdcompile.graph.weights import WeightSlice
from fdcompile.passes.fold_slices import dense_copy, fold_slices


class StaticWeights:
    """The static stage of a UNet's programs: what is computed from its weights, and from nothing else.

    `split_skips` reads parts of weights, which are not dense in memory: kernels would copy them at every call. The
    parts are held as copies instead, one for all programs of the UNet, and made again at the start of every run. To
    copy them is less work than to find out whether the weights have changed, and does not wait for the device.
    """

    def __init__(self) -> None:
        self._parts: Any = WeakIdKeyDictionary()  # a part lives as long as a stage that reads it

    def fold(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """`graph_module` with the parts of weights that it reads in place of the slices that it takes."""
        return fold_slices(graph_module, self.part_of)[0]

    def part_of(self, weight: Tensor, part: WeightSlice) -> nn.Parameter:
        """The dense copy of that part of `weight`, made if there is none."""
        for held, (source, of) in self._parts.items():
            if source is weight and of == part:
                return held  # type: ignore[no-any-return]
        with torch.inference_mode(False):
            made = dense_copy(weight, part)
        self._parts[made] = weight, part
        return made

    def refresh(self) -> None:
        """Copies the parts again, in place, where the weights are of the same type and on the same device still."""
        with torch.inference_mode(False), torch.no_grad():
            for held, (source, part) in list(self._parts.items()):
                view = part.view(source)
                if (held.shape, held.dtype, held.device) == (view.shape, view.dtype, view.device):
                    held.copy_(view)
                else:
                    held.data = part.of(source)
