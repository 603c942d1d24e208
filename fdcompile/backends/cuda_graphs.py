"""Replays callables as CUDA graphs, which removes the CPU time of kernel launches."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fdcompile.backends.protocols import Lowered
from fdcompile.graph.flops import Shape, shapes

Recording = tuple[Callable[[], None], tuple[Tensor, ...]]
"""Replays recorded kernels, and the tensors that they write to."""

_DROPS = 2
"""Number of times that all graphs are dropped because the weights have moved before recording stops."""


class CudaGraphs:
    """Replays `run` as one CUDA graph for each set of input shapes.

    A graph reads and writes fixed addresses. Arguments are copied to buffers, which graphs share for equal shapes,
    unless the buffer already holds that argument unchanged. Results are returned as copies, so later calls do not
    overwrite them. The first call of a set of shapes runs eagerly, because it may tune kernels, and is recorded
    afterwards. All graphs are dropped when the weights move in memory.

    Buffers and results are made outside of inference mode, so that calls inside and outside of it may alternate.

    Attributes:
        notes: reasons why calls are not replayed; empty if all are.
    """

    def __init__(self, run: Lowered, weights: Sequence[Tensor], device: CudaDevice) -> None:
        self.notes: tuple[str, ...] = ()
        self._run = run
        self._weights = weights
        self._device = device
        self._addresses: list[int] = []
        self._drops = 0
        self._buffers: dict[tuple[int, Shape], _Buffer] = {}
        self._recordings: dict[tuple[Shape, ...], Recording | None] = {}

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        with self._device.turn(), torch.inference_mode(False), torch.no_grad():
            self._follow_weights()
            if self._drops >= _DROPS:
                return self._run(*arguments)
            key = shapes(arguments)
            if key not in self._recordings:
                outputs = self._run(*arguments)
                self._recordings[key] = self._try_to_record(key, arguments)
                return outputs
            recording = self._recordings[key]
            if recording is None:
                return self._run(*arguments)
            self._fill(key, arguments)
            replay, outputs = recording
            replay()
            return tuple(output.clone() for output in outputs)

    def _follow_weights(self) -> None:
        addresses = [weight.data_ptr() for weight in self._weights]
        if addresses == self._addresses:
            return
        self._addresses = addresses
        if self._recordings:
            self._drops += 1
            self._recordings.clear()
        if self._drops >= _DROPS:
            self._buffers.clear()
            self.notes = (f"not replayed as CUDA graphs: the weights have moved {_DROPS} times (are they offloaded?)",)

    def _try_to_record(self, key: tuple[Shape, ...], arguments: Sequence[Tensor]) -> Recording | None:
        try:
            buffers = self._fill(key, arguments)
            return self._device.record(lambda: self._run(*buffers))
        except RuntimeError as error:  # out of memory raises several subclasses inside a capture
            reason = str(error).partition("\n")[0]
            self.notes = (f"not replayed as a CUDA graph for some shapes: {type(error).__name__}: {reason}",)
            return None

    def _fill(self, key: tuple[Shape, ...], arguments: Sequence[Tensor]) -> list[Tensor]:
        buffers = []
        stale, sources = [], []
        for place, tensor in zip(enumerate(key), arguments, strict=True):
            buffer = self._buffers.get(place)
            if buffer is None:
                buffer = self._buffers[place] = _Buffer(tensor)
            if not buffer.holds(tensor):
                stale.append(buffer.tensor)
                sources.append(tensor)
            buffers.append(buffer.tensor)
        if stale:
            torch._foreach_copy_(stale, sources)
        return buffers


class _Buffer:
    """A buffer for an argument, and a reference to the tensor that was last copied to it."""

    def __init__(self, like: Tensor) -> None:
        self.tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        self._source: Callable[[], Tensor | None] = lambda: None
        self._version = -1

    def holds(self, tensor: Tensor) -> bool:
        """Whether the buffer holds the current content of `tensor`. Marks it as copied: the caller must copy it."""
        if tensor.is_inference():  # has no version counter
            self._source = lambda: None
            return False
        held = self._source() is tensor and self._version == tensor._version
        self._source, self._version = weakref.ref(tensor), tensor._version
        return held


class CudaDevice:
    """Memory pool, lock and stream order of all graphs of a CUDA device.

    The graphs share one memory pool, so no two may run at the same time: a call waits for the kernels of the previous
    one if that ran on another stream. Other threads may allocate and synchronize while a graph is recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._stream: Any = None
        self._pool: Any = None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Locks the device, makes it current, and waits for the stream of the previous turn."""
        with self._lock, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream(self._device)
            if self._stream is not None and stream != self._stream:
                stream.wait_stream(self._stream)
            self._stream = stream
            yield

    def record(self, run: Callable[[], tuple[Tensor, ...]]) -> Recording:
        """Captures the kernels of `run`, which are first executed by a replay. Must be called within a `turn`."""
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would use a stream of the device that first captured a graph.
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            outputs = run()
        return graph.replay, outputs


@functools.cache
def cuda_device(device: torch.device) -> CudaDevice:
    """Returns the shared `CudaDevice` of `device`, which must have an index."""
    return CudaDevice(device)
