"""Replay a callable as a CUDA graph, so that launching its kernels costs the CPU next to nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fdcompile.backends.protocols import Lowered
from fdcompile.graph.flops import Shape, shapes

Recording = tuple[Callable[[], None], tuple[Tensor, ...]]
"""What runs recorded kernels again, and the tensors that they write."""


class CudaGraphs:
    """Answers calls of `run` by replaying it: one graph for each set of shapes, recorded at their second call.

    A graph reads and writes fixed addresses. So arguments are copied into buffers of its own, which graphs share where
    shapes agree, and results are handed out as copies: a later call never overwrites what an earlier one returned.
    The first call of a set of shapes runs as it is, because it may tune kernels. When the weights have moved in memory,
    all graphs are dropped.

    `record` runs a callable without arguments and returns its `Recording`.
    """

    def __init__(
        self,
        run: Lowered,
        weights: Sequence[Tensor],
        record: Callable[[Callable[[], tuple[Tensor, ...]]], Recording] | None = None,
    ) -> None:
        self._run = run
        self._weights = weights
        self._record = record or record_cuda_graph
        self._addresses: list[int] = []
        self._seen: set[tuple[Shape, ...]] = set()
        self._buffers: dict[tuple[int, Shape], Tensor] = {}
        self._recordings: dict[tuple[Shape, ...], Recording] = {}

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        addresses = [weight.data_ptr() for weight in self._weights]
        if addresses != self._addresses:
            self._addresses = addresses
            self._recordings.clear()
            self._seen.clear()
        key = shapes(arguments)
        if key not in self._seen:
            self._seen.add(key)
            return self._run(*arguments)
        buffers = [self._buffer(place, tensor) for place, tensor in zip(enumerate(key), arguments, strict=True)]
        torch._foreach_copy_(buffers, arguments)
        if key not in self._recordings:
            self._recordings[key] = self._record(lambda: self._run(*buffers))
        replay, outputs = self._recordings[key]
        replay()
        return tuple(output.clone() for output in outputs)

    def _buffer(self, place: tuple[int, Shape], like: Tensor) -> Tensor:
        if place not in self._buffers:
            self._buffers[place] = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        return self._buffers[place]


def record_cuda_graph(run: Callable[[], tuple[Tensor, ...]]) -> Recording:
    """Captures `run` on the current device. Nothing is computed before the first replay.

    All graphs share one memory pool: they run one after the other, and what they return stays reserved.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool()):
        outputs = run()
    return graph.replay, outputs


@functools.cache
def _pool() -> Any:
    return torch.cuda.graph_pool_handle()
