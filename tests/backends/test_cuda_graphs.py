"""CUDA graphs: fixed buffers inside, nothing shared outside. Recording is replaced by a stand-in on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fdcompile.backends.cuda_graphs import CudaGraphs, Recording


class Recorder:
    """Keeps what a CUDA graph keeps: the addresses that were read and written while recording."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, run: Callable[[], tuple[Tensor, ...]]) -> Recording:
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
    assert (recorder.recorded, recorder.replayed) == (1, 4), "the first call runs as it is"


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records real CUDA graphs: needs a CUDA device")
def test_a_real_cuda_graph() -> None:
    layer = torch.nn.Linear(8, 8, device="cuda").requires_grad_(False)
    graphs = CudaGraphs(lambda x: (layer(x),), list(layer.parameters()))
    inputs = torch.randn(4, 2, 8, device="cuda")
    results = [graphs(x)[0] for x in inputs]
    torch.testing.assert_close(torch.stack(results), layer(inputs))
