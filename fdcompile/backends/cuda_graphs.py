"""Replay a callable as a CUDA graph, so that launching its kernels costs the CPU next to nothing."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fdcompile.backends.protocols import Lowered
from fdcompile.graph.flops import Shape, shapes

Recording = tuple[Callable[[], None], tuple[Tensor, ...]]
"""What runs recorded kernels again, and the tensors that they write."""

_DROPS = 2
"""After so many times that all graphs were dropped because the weights had moved, none are recorded any more."""


class GraphDevice(Protocol):
    """Where graphs are recorded and replayed."""

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """Surrounds a call: those of other threads wait for it, and its kernels for theirs."""

    def record(self, run: Callable[[], tuple[Tensor, ...]]) -> Recording:
        """Captures `run`, which is not executed; within a `turn`."""


class CudaGraphs:
    """Answers calls of `run` by replaying it: one graph for each set of shapes, recorded at their first call.

    A graph reads and writes fixed addresses. So arguments are copied into buffers, which graphs share where shapes
    agree, and results are handed out as copies: a later call never overwrites what an earlier one returned. An argument
    that a buffer holds already, unchanged since, is not copied again. The first call of a set of shapes runs as it is,
    because it may tune kernels, and is recorded then. When the weights have moved in memory, all graphs are dropped.

    Buffers and results are made outside of inference mode, so that calls inside and outside of it may alternate.

    Attributes:
        notes: why calls are not replayed, if they are not.
    """

    def __init__(self, run: Lowered, weights: Sequence[Tensor], device: GraphDevice) -> None:
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
        except RuntimeError as error:  # out of memory surfaces as several kinds of it inside a capture
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
    """A fixed place for an argument, and which tensor was copied to it last."""

    def __init__(self, like: Tensor) -> None:
        self.tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        self._source: Callable[[], Tensor | None] = lambda: None
        self._version = -1

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` was copied here last and not written to since; from now on it counts as copied here."""
        if tensor.is_inference():  # those do not count their writes
            self._source = lambda: None
            return False
        held = self._source() is tensor and self._version == tensor._version
        self._source, self._version = weakref.ref(tensor), tensor._version
        return held


class CudaDevice:
    """What all graphs of a CUDA device share.

    They have one memory pool, so no two of them may run at the same time: a call waits for the kernels of the one
    before where that was made on another stream. Other threads may allocate and wait while a graph is recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._stream: Any = None
        self._pool: Any = None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Holds the device, makes it the current one, and orders its streams."""
        with self._lock, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream(self._device)
            if self._stream is not None and stream != self._stream:
                stream.wait_stream(self._stream)
            self._stream = stream
            yield

    def record(self, run: Callable[[], tuple[Tensor, ...]]) -> Recording:
        """Captures `run`. Nothing is computed before the first replay."""
        graph = torch.cuda.CUDAGraph()
        # Torch's default is a stream of the device that captured first.
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            outputs = run()
        return graph.replay, outputs


@functools.cache
def cuda_device(device: torch.device) -> CudaDevice:
    """The one `CudaDevice` of `device`, which has an index."""
    return CudaDevice(device)
