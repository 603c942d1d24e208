"""Is this still the prompt that the group was computed for?"""

from __future__ import annotations

import torch
from torch import Tensor

from fdcompile.capture.guards import TensorGuard
from fdcompile.runtime.concatenation import concatenated_with


class FixedChannels:
    """Channels of the latent that no step changes: a mask or a picture beside it, which is conditioning, too.

    Pipelines concatenate them with the latents anew at every step. Where the values are on an accelerator, the tensors
    that were concatenated are looked up in the caller and followed like a prompt (`concatenated_with`). Elsewhere, and
    where no caller shows them, the values are compared, which waits for the device. Which channels to compare shows at
    the second step: those that did not move, if as many moved as the UNet predicts.
    """

    def __init__(self, axis: int, moving: int) -> None:
        self._axis = axis
        self._moving = moving
        self._last: Tensor | None = None
        self._fixed: Tensor | None = None
        self._sources: Conditioning | None = None

    def same_as(self, sample: Tensor) -> bool:
        """Whether they are in `sample` what they were when this was asked before."""
        last, self._last = self._last, sample
        tensors = None
        if not TensorGuard.compares_content(sample):
            tensors = concatenated_with(sample, self._axis, sample.shape[self._axis] - self._moving)
        sources = self._sources
        if last is None or last.shape != sample.shape or (sources is None) != (tensors is None):
            self._fixed = None
            self._sources = None if tensors is None else Conditioning(tensors)
            return last is None
        if sources is None or tensors is None:
            return self._same_values(last, sample)
        if sources.same_as(tensors):
            return True
        self._sources = Conditioning(tensors)
        return False

    def _same_values(self, last: Tensor, sample: Tensor) -> bool:
        if self._fixed is not None:
            return torch.equal(*(latents.index_select(self._axis, self._fixed) for latents in (last, sample)))
        moved = (last != sample).movedim(self._axis, 0).flatten(1).any(1)
        if int(moved.sum()) != self._moving:
            return False
        self._fixed = (~moved).nonzero().flatten()
        return True


class Conditioning:
    """The prompt-bound tensors that a call slot's values were computed from.

    Pipelines pass the same objects at every step, or the same views of them, which is seen without touching an
    accelerator. Other objects are compared by value. Anything that was written to since counts as changed (see
    `TensorGuard`).
    """

    def __init__(self, tensors: tuple[Tensor, ...] | None = None) -> None:
        self._seen = None if tensors is None else tuple(map(TensorGuard, tensors))

    def same_as(self, tensors: tuple[Tensor, ...]) -> bool:
        if self._seen is None or len(tensors) != len(self._seen):
            return False
        if not all(seen.untouched() for seen in self._seen):
            return False
        pairs = list(zip(self._seen, tensors, strict=True))
        if all(tensor is seen.tensor for seen, tensor in pairs):
            return True
        if not all(tensor is seen.tensor or seen.equals(tensor) for seen, tensor in pairs):
            return False
        self._seen = tuple(map(TensorGuard, tensors))
        return True
