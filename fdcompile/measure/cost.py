"""Cost of a variant: FLOPs, time compared with stock, memory."""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fdcompile.api import explain
from fdcompile.graph.flops import flop_counter
from fdcompile.measure.timeline import Timeline
from fdcompile.measure.timing import device_timer, time_pairs
from fdcompile.pipeline.session import find_session

if TYPE_CHECKING:
    from fdcompile.report import Report

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cost:
    """Cost of an image.

    Attributes:
        gflop: GFLOP of the UNet; a multiply-add counts as two.
        unet_calls: calls of the stock UNet, or encoder runs, in one run of the sampler.
        seconds: median time of a pipeline call, divided by its images.
        unet_seconds: median time of the UNet calls in it, divided by its images.
        ratio: median ratio of the time to that of a stock call just before; None for stock itself.
        memory: peak bytes of a call, weights included; None if they cannot be counted.
        timeline: steps of an optimized run; None for stock.
        stock_seconds: median time of those stock calls, divided by their images; None for stock itself.
    """

    gflop: float
    unet_calls: int
    seconds: float
    unet_seconds: float
    ratio: float | None
    memory: int | None
    timeline: Timeline | None
    stock_seconds: float | None = None


@dataclass(frozen=True)
class Work:
    """Work of the UNet in a pipeline call.

    Attributes:
        flops: FLOPs; a multiply-add counts as two.
        unet_calls: calls of the stock UNet, or encoder runs of an optimized one.
        report: report on the optimized call; None for a stock one.
    """

    flops: int
    unet_calls: int
    report: Report | None = None

    @classmethod
    def of(cls, report: Report) -> Work:
        return cls(report.flops, report.encoder_runs, report)


def count_work(pipe: Any, call: Callable[[], Result]) -> tuple[Result, Work]:
    """Runs `call`, which calls `pipe` once. Returns its result and the work of the UNet."""
    if find_session(pipe) is not None:
        return call(), Work.of(explain(pipe))
    counter, counted = flop_counter(), list[int]()

    def end() -> None:
        counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        counted.append(counter.get_total_flops())

    with _hooked(pipe.unet, counter.__enter__, end):
        return call(), Work(sum(counted), len(counted))


def measure(name: str, pipe: Any, stock: Any | None, call: Callable[[Any], None], images: int) -> Cost:
    """Measures the cost of `call`.

    Args:
        name: name of the variant, for the timeline.
        pipe: pipeline of the variant.
        stock: stock pipeline to time alternately with `pipe`; None if `pipe` is the stock pipeline.
        call: calls the pipeline that it is given.
        images: number of images per call.
    """
    _, work = count_work(pipe, lambda: call(pipe))  # captures and compiles
    unet_seconds: list[float] = []
    timer = device_timer(pipe.device)

    def timed() -> None:
        began: list[float] = []
        spent: list[float] = []
        with _hooked(pipe.unet, lambda: began.append(timer()), lambda: spent.append(timer() - began.pop())):
            call(pipe)
        unet_seconds.append(sum(spent))

    pairs = time_pairs(timed, None if stock is None else lambda: call(stock), timer)
    if work.report is not None:
        work = Work.of(explain(pipe))  # of a run that did not capture or compile
    return Cost(
        gflop=work.flops / images / 1e9,
        unet_calls=work.unet_calls,
        seconds=statistics.median(pairs.seconds) / images,
        unet_seconds=statistics.median(unet_seconds) / images,
        ratio=pairs.ratio,
        memory=peak_bytes(pipe, call),
        timeline=None if work.report is None else Timeline.of(name, work.report),
        stock_seconds=statistics.median(pairs.stock_seconds) / images if pairs.stock_seconds else None,
    )


@contextmanager
def _hooked(module: nn.Module, begin: Callable[[], Any], end: Callable[[], Any]) -> Iterator[None]:
    def before(*_: Any) -> None:
        begin()  # a result would replace the arguments

    def after(*_: Any) -> None:
        end()

    with module.register_forward_pre_hook(before), module.register_forward_hook(after):
        yield


def peak_bytes(pipe: Any, call: Callable[[Any], None]) -> int | None:
    """Returns the peak bytes of a call, from CUDA's counter or from the tensors made by torch and the weights.

    None if compiled code runs on a CPU, because its allocations cannot be observed.
    """
    if pipe.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pipe.device)
        call(pipe)
        return torch.cuda.max_memory_allocated(pipe.device)
    session = find_session(pipe)
    if session is not None and session.config.backend not in ("auto", "eager"):
        return None
    live = LiveBytes()
    with live:
        call(pipe)
    weights = {
        tensor
        for part in pipe.components.values()
        if isinstance(part, nn.Module)
        for tensor in (*part.parameters(), *part.buffers())
    }
    return live.peak + sum(tensor.nbytes for tensor in weights)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that torch makes in the block.

    Attributes:
        peak: largest number of bytes that were alive together.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
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
                self.peak = max(self.peak, self._live)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self._live -= size


def _storages(values: Any) -> Iterator[Any]:
    return (value.untyped_storage() for value in pytree.tree_leaves(values) if isinstance(value, Tensor))
