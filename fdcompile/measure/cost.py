"""What a way to make pictures costs: FLOPs, time beside stock, memory."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fdcompile.api import explain
from fdcompile.graph.flops import flop_counter
from fdcompile.measure.timeline import Timeline
from fdcompile.pipeline.session import find_session

PAIRS = 3


@dataclass(frozen=True)
class Cost:
    """What a picture costs.

    Attributes:
        gflop: of the UNet; a multiply-add is two.
        unet_calls: of the stock UNet, or runs of the encoder, in one run of the sampler.
        seconds: its share of a pipeline call, median; `unet_seconds`: of the UNet's calls in that.
        ratio: of `seconds` to those of a stock call just before, median; None for stock itself.
        memory: most bytes that were alive during a call, weights included; None where nobody counts them.
        timeline: what ran at which step, of an optimised run.
    """

    gflop: float
    unet_calls: int
    seconds: float
    unet_seconds: float
    ratio: float | None
    memory: int | None
    timeline: Timeline | None


def measure(name: str, pipe: Any, beside: Any | None, call: Callable[[Any], None], pictures: int) -> Cost:
    """What `call` costs with `pipe`, stock or optimised, the way called `name`; timed alternately with `beside`."""
    stock_flops, unet_calls = _warmup(pipe, call)
    times, ratios = [], []
    for _ in range(PAIRS):
        stock = None if beside is None else _seconds(beside, call)[0]
        times.append(_seconds(pipe, call))
        if stock is not None:
            ratios.append(times[-1][0] / stock)
    report = explain(pipe) if find_session(pipe) is not None else None  # of a run that was not the first
    whole, unet = (statistics.median(own) / pictures for own in zip(*times, strict=True))
    return Cost(
        gflop=(stock_flops if report is None else report.flops) / pictures / 1e9,
        unet_calls=unet_calls if report is None else report.encoder_runs,
        seconds=whole,
        unet_seconds=unet,
        ratio=statistics.median(ratios) if ratios else None,
        memory=peak_bytes(pipe, call),
        timeline=None if report is None else Timeline.of(name, report),
    )


def _warmup(pipe: Any, call: Callable[[Any], None]) -> tuple[int, int]:
    """FLOPs of all stock calls of the UNet, if it is stock, and how many there were."""
    counter, counted = flop_counter(), list[int]()
    if find_session(pipe) is not None:
        call(pipe)
        return 0, 0

    def end(*_: Any) -> None:
        counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        counted.append(counter.get_total_flops())

    with _hooked(pipe.unet, counter.__enter__, end):
        call(pipe)
    return sum(counted), len(counted)


def _seconds(pipe: Any, call: Callable[[Any], None]) -> tuple[float, float]:
    """Of all of it, which ends with the pictures in main memory, and of the UNet."""
    spent = 0.0
    began = [0.0]

    def begin() -> None:
        began[0] = _now(pipe)

    def end(*_: Any) -> None:
        nonlocal spent
        spent += _now(pipe) - began[0]

    with _hooked(pipe.unet, begin, end):
        start = time.perf_counter()
        call(pipe)
        return _now(pipe) - start, spent


@contextmanager
def _hooked(module: nn.Module, begin: Callable[..., Any], end: Callable[..., Any]) -> Iterator[None]:
    def before(*_: Any) -> None:
        begin()  # what it returns is not for the module

    handles = module.register_forward_pre_hook(before), module.register_forward_hook(end)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _now(pipe: Any) -> float:
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)
    return time.perf_counter()


def peak_bytes(pipe: Any, call: Callable[[Any], None]) -> int | None:
    """Most bytes alive in a call: by CUDA's own counter, or what torch's operations make, and the pipeline's weights.

    None where compiled code runs on a CPU, which does not say what it needs.
    """
    if pipe.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pipe.device)
        call(pipe)
        return torch.cuda.max_memory_allocated(pipe.device)
    session = find_session(pipe)
    if session is not None and session.config.backend not in ("auto", "eager"):
        return None
    with live_bytes() as most:
        call(pipe)
    weights = {
        id(tensor): tensor.numel() * tensor.element_size()
        for part in pipe.components.values()
        if isinstance(part, nn.Module)
        for tensor in (*part.parameters(), *part.buffers())
    }
    return most() + sum(weights.values())


@contextmanager
def live_bytes() -> Iterator[Callable[[], int]]:
    """Counts the bytes of all that torch makes in the block; what it yields says how many were alive at most."""
    with _LiveBytes() as counter:
        yield lambda: counter.most


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._live = 0
        self._known = weakref.WeakSet[Any]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {id(storage) for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if id(storage) not in given and storage not in self._known:
                self._known.add(storage)
                self._live += storage.nbytes()
                self.most = max(self.most, self._live)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self._live -= size


def _storages(values: Any) -> Iterator[Any]:
    return (value.untyped_storage() for value in pytree.tree_leaves(values) if isinstance(value, Tensor))
