"""Detects changes of the conditioning between UNet calls."""

from __future__ import annotations

import torch
from torch import Tensor

from fdcompile.capture.guards import TensorGuard
from fdcompile.runtime.concatenation import concatenated_with


class FixedChannels:
    """Channels of the UNet's input that do not change between steps: a mask or an image, which is conditioning.

    Pipelines concatenate them with the latents at every step. On an accelerator the concatenated tensors are looked up
    in the caller and compared like a prompt (`concatenated_with`). Otherwise, and where the caller does not show them,
    their values are compared, which synchronizes with the device. The channels to compare are found at the second step:
    those that have not changed, if as many have changed as the UNet predicts.
    """

    def __init__(self, axis: int, moving: int) -> None:
        self._axis = axis
        self._moving = moving
        self._last: Tensor | None = None
        self._fixed: Tensor | None = None
        self._sources: Conditioning | None = None

    def same_as(self, sample: Tensor) -> bool:
        """Whether these channels of `sample` are equal to those of the previous call."""
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
    """The tensors that a call slot's values were computed from.

    Pipelines pass the same objects at every step, or the same views of them, which are recognized without reading from
    the device. Other objects are compared by value. Tensors that were written to count as changed (see `TensorGuard`).
    """

    def __init__(self, tensors: tuple[Tensor, ...] | None = None) -> None:
        self._seen = None if tensors is None else tuple(map(TensorGuard, tensors))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(seen.tensor for seen in self._seen or ())

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
