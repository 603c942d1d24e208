"""CUDA graphs: fixed buffers inside, nothing shared outside. Recording is replaced by a stand-in on a CPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fdcompile.backends.cuda_graphs import CudaDevice, CudaGraphs, Recording, cuda_device
from fdcompile.backends.inductor import with_scalars


class Recorder:
    """Keeps what a CUDA graph keeps: the addresses that were read and written while recording."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0
        self.turns = 0

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        self.turns += 1
        yield

    def record(self, run: Callable[[], tuple[Tensor, ...]]) -> Recording:
        outputs = run()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for output, new in zip(outputs, run(), strict=True):
                output.copy_(new)

        return replay, outputs


def test_results_are_right_and_no_later_call_overwrites_them() -> None:
    weight, recorder = torch.ones(3), Recorder()
    graphs = CudaGraphs(lambda x, y: (x * y, x + weight), [weight], recorder)
    results, expected = [], []
    for seed in range(5):
        x, y = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)).unbind()
        results.append(graphs(x, y))
        expected.append((x * y, x + 1))
    torch.testing.assert_close(results, expected)
    assert (recorder.recorded, recorder.replayed, recorder.turns) == (1, 4, 5), "the first call runs as it is"


def test_arguments_are_left_alone_and_may_change_afterwards() -> None:
    graphs = CudaGraphs(lambda x: (x.square(),), [], Recorder())
    x = torch.tensor([3.0])
    for _ in range(3):
        (result,) = graphs(x)
        x += 1
        torch.testing.assert_close(result, (x - 1).square())
    torch.testing.assert_close(x, torch.tensor([6.0]))


def test_each_set_of_shapes_has_its_recording() -> None:
    recorder = Recorder()
    graphs = CudaGraphs(lambda x, y: (x + y,), [], recorder)
    shared = torch.randn(4)
    for _ in range(3):
        for steps in (1, 2):
            x = torch.randn(steps, 4)
            torch.testing.assert_close(graphs(x, shared), (x + shared,))
    assert recorder.recorded == 2
    assert len(graphs._buffers) == 3, "one for each x, and one for what both graphs read"


def test_weights_that_moved_are_recorded_again_and_written_ones_are_read() -> None:
    weight, recorder = torch.nn.Parameter(torch.ones(2)), Recorder()
    graphs = CudaGraphs(lambda x: (x * weight.data,), [weight], recorder)
    x = torch.ones(2)
    for _ in range(2):
        graphs(x)
    weight.data.fill_(2)
    torch.testing.assert_close(graphs(x), (torch.full((2,), 2.0),))
    assert recorder.recorded == 1
    weight.data = torch.full((2,), 3.0)
    for _ in range(2):
        torch.testing.assert_close(graphs(x), (torch.full((2,), 3.0),))
    assert recorder.recorded == 2


def test_nothing_is_recorded_after_the_first_call_of_a_set_of_shapes() -> None:
    recorder = Recorder()
    graphs = CudaGraphs(lambda x: (x + 1,), [], recorder)
    graphs(torch.ones(2))
    graphs(torch.ones(3))
    assert recorder.recorded == 2
    for _ in range(3):
        graphs(torch.ones(2))
        graphs(torch.ones(3))
    assert (recorder.recorded, recorder.replayed) == (2, 6)


@pytest.mark.parametrize("modes", [(True, False), (False, True)], ids=["inference first", "inference after"])
def test_calls_inside_and_outside_of_inference_mode_follow_each_other(modes: tuple[bool, bool]) -> None:
    graphs = CudaGraphs(lambda x: (x * 2,), [], Recorder())
    for number, mode in enumerate((*modes, *modes)):
        with torch.no_grad(), torch.inference_mode(mode):
            x = torch.full((3,), float(number))
            (result,) = graphs(x)
            torch.testing.assert_close(result, x * 2)
            result += 1  # of a kind that either mode may write to


def test_weights_that_keep_moving_are_given_up_on() -> None:
    """As under model offload, where they move for every image."""
    weight, recorder = torch.nn.Parameter(torch.ones(2)), Recorder()
    graphs = CudaGraphs(lambda x: (x * weight.data,), [weight], recorder)
    kept = []
    for image in range(5):
        kept.append(weight.data)
        weight.data = torch.full((2,), float(image))
        for _ in range(2):
            torch.testing.assert_close(graphs(torch.ones(2)), (torch.full((2,), float(image)),))
    assert (recorder.recorded, recorder.replayed) == (2, 2)
    assert not graphs._buffers
    assert "the weights have moved 2 times" in graphs.notes[0]


def test_what_cannot_be_recorded_runs_as_it_is() -> None:
    """Out of memory inside a capture is a plain RuntimeError, by what the allocator may not do there."""

    class Failing(Recorder):
        def record(self, run: Callable[[], tuple[Tensor, ...]]) -> Recording:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphs = CudaGraphs(lambda x: (x + 1,), [], Failing())
    for _ in range(3):
        torch.testing.assert_close(graphs(torch.ones(2)), (torch.full((2,), 2.0),))
    assert graphs.notes == (
        "not replayed as a CUDA graph for some shapes: RuntimeError: operation not permitted when stream is capturing",
    )


def test_an_argument_is_copied_again_only_if_it_was_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda into, of: copied.append(len(of)) or copy(into, of))
    graphs = CudaGraphs(lambda x, y: (x + y,), [], Recorder())
    features, other = torch.ones(3), torch.full((3,), 5.0)
    for step in range(4):
        torch.testing.assert_close(graphs(features, torch.full((3,), float(step))), (torch.full((3,), step + 1.0),))
    assert copied == [2, 1, 1, 1]
    features += 1
    torch.testing.assert_close(graphs(features, other), (torch.full((3,), 7.0),))
    torch.testing.assert_close(graphs(other, other), (torch.full((3,), 10.0),))
    torch.testing.assert_close(graphs(features, other), (torch.full((3,), 7.0),))
    assert copied[4:] == [2, 1, 1]
    with torch.inference_mode():
        features = torch.ones(3)
        for value in (2.0, 3.0):
            features.fill_(value)
            torch.testing.assert_close(graphs(features, other), (torch.full((3,), value + 5),))


def test_scalars_on_the_cpu_are_moved_to_the_device() -> None:
    """Compiled code would read them, and a graph would keep what was read when it was recorded."""
    scale, x = torch.tensor(2.0), torch.ones(2, device="meta")
    assert [tensor.device.type for tensor in with_scalars([x, scale], [])] == ["meta", "meta"]
    assert [tensor.device.type for tensor in with_scalars([scale], [x])] == ["meta"]
    assert with_scalars([scale, torch.ones(2)], [])[0] is scale


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of ``torch.cuda``, in order; there are two streams."""
    asked: list[Any] = []

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.device = device

        def wait_stream(self, other: Any) -> None:
            asked.append(("wait", self, other))

    @contextlib.contextmanager
    def current(device: Any) -> Iterator[None]:
        asked.append(("device", device.index))
        yield
        asked.append(("leave", device.index))

    @contextlib.contextmanager
    def graph(graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        asked.append(("capture", pool, stream.device.index, capture_error_mode))
        yield

    class Graph:
        def replay(self) -> None:
            asked.append("replay")

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    streams = {thread: Stream() for thread in ("MainThread", "other")}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[threading.current_thread().name])
    return asked


def test_a_graph_is_captured_on_the_device_of_the_stage_whichever_is_current(cuda: list[Any]) -> None:
    graphs = CudaGraphs(lambda x: (x + 1,), [], CudaDevice(torch.device("cuda", 1)))
    graphs(torch.ones(1))
    assert cuda == [("device", 1), ("capture", "pool", 1, "thread_local"), ("leave", 1)]
    assert cuda_device(torch.device("cuda", 1)) is not cuda_device(torch.device("cuda", 0))


def test_a_call_on_another_stream_waits_for_the_one_before(cuda: list[Any]) -> None:
    """Graphs share a memory pool and their buffers."""
    device = CudaDevice(torch.device("cuda", 0))
    graphs = [CudaGraphs(lambda x: (x + 1,), [], device) for _ in range(2)]

    def call(which: int) -> None:
        graphs[which](torch.ones(1))

    for which, name in ((0, "MainThread"), (1, "MainThread"), (1, "other"), (0, "other"), (0, "MainThread")):
        if name == "MainThread":
            call(which)
        else:
            thread = threading.Thread(target=call, args=(which,), name=name)
            thread.start()
            thread.join()
    waits = [event for event in cuda if event[0] == "wait"]
    assert len(waits) == 2
    assert (waits[0][1], waits[0][2]) == (waits[1][2], waits[1][1])


def test_a_call_waits_for_that_of_another_thread(cuda: list[Any]) -> None:
    device = CudaDevice(torch.device("cuda", 0))
    order: list[str] = []
    inside, may_go = threading.Event(), threading.Event()

    def slow(x: Tensor) -> tuple[Tensor, ...]:
        order.append("begins")
        inside.set()
        may_go.wait(1)
        order.append("ends")
        return (x,)

    thread = threading.Thread(target=lambda: CudaGraphs(slow, [], device)(torch.ones(1)), name="other")
    thread.start()
    inside.wait()
    threading.Timer(0.05, may_go.set).start()
    CudaGraphs(lambda x: (order.append("next") or x,), [], device)(torch.ones(1))
    thread.join()
    assert order.index("next") > order.index("ends")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records real CUDA graphs: needs a CUDA device")
def test_a_real_cuda_graph() -> None:
    layer = torch.nn.Linear(8, 8, device="cuda").requires_grad_(False)
    device = cuda_device(torch.device("cuda", torch.cuda.current_device()))
    graphs = CudaGraphs(lambda x: (layer(x),), list(layer.parameters()), device)
    inputs = torch.randn(4, 2, 8, device="cuda")
    results = [graphs(x)[0] for x in inputs]
    torch.testing.assert_close(torch.stack(results), layer(inputs))
