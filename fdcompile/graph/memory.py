"""Estimates the memory that a graph needs, without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fdcompile.graph.flops import Shape
from fdcompile.graph.weights import lift_weights


def live_bytes(graph_module: fx.GraphModule, inputs: Iterable[Shape]) -> list[int]:
    """Bytes of live inputs and intermediates, without weights, after each operation of a run on inputs of these shapes.

    A tensor is live until its last reader has run; inputs are live throughout, because the caller holds them. Workspace
    of kernels is not included, and code of a compiler that fuses operations needs less.
    """
    lifted, weights = lift_weights(graph_module)
    fake_mode = FakeTensorMode()
    fakes: list[Tensor] = [fake_mode.from_tensor(weight.detach(), static_shapes=True) for weight in weights]
    with fake_mode, torch.no_grad():
        held = [shape.empty() for shape in inputs]
        profile = _Profile(lifted, free=fakes, held=held)
        profile.run(*fakes, *held)
    return profile.live


def weight_bytes(graph_module: fx.GraphModule) -> int:
    """Bytes of the weights that `graph_module` reads."""
    return sum({id(weight): weight.nbytes for weight in lift_weights(graph_module)[1]}.values())


def free_bytes(device: torch.device) -> int | None:
    """Bytes that torch can allocate on a CUDA device, including its unused cached memory; None on other devices."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def most_steps(one: Sequence[int], two: Sequence[int], budget: float) -> int:
    """Number of steps that fit into `budget` bytes, at least 1, given the `live_bytes` of `one` and of `two`."""
    limits = [
        (budget - first) // (second - first) + 1 for first, second in zip(one, two, strict=True) if second > first
    ]
    return max(1, int(min(limits, default=1)))


class _Profile(fx.Interpreter):
    """Runs a graph, and counts the bytes of all storages that are live after each operation."""

    def __init__(self, graph_module: fx.GraphModule, free: list[Tensor], held: list[Tensor]) -> None:
        super().__init__(graph_module)
        self.live: list[int] = []
        self._free = set(map(_storage, free))
        self._holders: Counter[int] = Counter()
        self._bytes = 0
        self._count(held, 1)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self._count(result, 1)
        self.live.append(self._bytes)
        for read in self.user_to_last_uses.get(n, ()):
            self._count(self.env[read], -1)
        return result

    def _count(self, values: Any, holders: int) -> None:
        for value in pytree.tree_leaves(values):
            if isinstance(value, Tensor) and (storage := _storage(value)) not in self._free:
                was_held = self._holders[storage] > 0
                self._holders[storage] += holders
                self._bytes += ((self._holders[storage] > 0) - was_held) * value.untyped_storage().nbytes()


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
