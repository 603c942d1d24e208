"""Host copies of small tensors, read from the device together."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from fdcompile.capture.guards import TensorGuard


class HostCopies:
    """Values of small tensors as flat lists. Tensors that were written to are read again."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[TensorGuard, list[float]]] = {}

    def read(self, *tensors: Tensor) -> None:
        """Copies `tensors` to the host, with one synchronization for each device."""
        places: dict[torch.device, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            places[tensor.device].append(tensor)
        for together in places.values():
            values = _joined(together).tolist()
            for tensor in together:
                self._copies[id(tensor)] = TensorGuard(tensor), values[: tensor.numel()]
                del values[: tensor.numel()]

    def values(self, tensor: Tensor) -> list[float]:
        """Values of `tensor`, flattened. Synchronizes if there is no current copy."""
        guard, values = self._copies.get(id(tensor), (None, []))
        if guard is None or not guard.untouched():
            self.read(tensor)
            guard, values = self._copies[id(tensor)]
        return values


def _joined(tensors: list[Tensor]) -> Tensor:
    """Concatenates all values in a type that represents them exactly (timesteps are below 2 ** 24)."""
    if len(tensors) == 1:
        return tensors[0].flatten()
    return torch.cat([(one if one.dtype == torch.float64 else one.float()).flatten() for one in tensors])
