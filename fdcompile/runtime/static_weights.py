"""Dense copies of the parts of a UNet's weights that its stages read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from fdcompile.graph.weights import WeightSlice
from fdcompile.passes.fold_slices import dense_copy, fold_slices


class StaticWeights:
    """Dense copies of parts of a UNet's weights, shared by all of its programs.

    `split_skips` reads slices of weights, which are not dense in memory, so kernels would copy them at every call. The
    copies are made once and updated at the start of every run: that takes less time than a comparison with the weights,
    and does not synchronize with the device.
    """

    def __init__(self) -> None:
        self._parts: Any = WeakIdKeyDictionary()  # a part lives as long as a stage reads it

    def fold(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """Replaces slices of weights in `graph_module` by their dense copies."""
        return fold_slices(graph_module, self.part_of)[0]

    def part_of(self, weight: Tensor, part: WeightSlice) -> nn.Parameter:
        """Returns the dense copy of `part` of `weight`, made if there is none."""
        for held, (source, of) in self._parts.items():
            if source is weight and of == part:
                return held  # type: ignore[no-any-return]
        with torch.inference_mode(False):
            made = dense_copy(weight, part)
        self._parts[made] = weight, part
        return made

    def refresh(self) -> None:
        """Updates all copies, in place where the type and device of the weights are unchanged."""
        outdated, views = [], []
        with torch.inference_mode(False), torch.no_grad():
            for held, (source, part) in list(self._parts.items()):
                view = part.view(source)
                if (held.shape, held.dtype, held.device) == (view.shape, view.dtype, view.device):
                    outdated.append(held)
                    views.append(view)
                else:
                    held.data = part.of(source)
            if outdated:
                torch._foreach_copy_(outdated, views)
