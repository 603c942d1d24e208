"""What only a CUDA device can show. `make gpu` runs it and writes down what it saw."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TEXTS, sample, small_pipe
from torch import Tensor, nn

import fdcompile
from fdcompile import Config
from fdcompile.backends.cuda_graphs import CudaDevice, CudaGraphs, cuda_device
from fdcompile.backends.inductor import InductorBackend
from fdcompile.pipeline.session import find_session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIG = {"key_steps": (0, 1, 4), "max_parallel_steps": 3}


@pytest.fixture(scope="module", autouse=True)
def _exact() -> Any:
    """Float32 as on a CPU: the tolerances below are not TF32's."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def cuda_pipe() -> Any:
    return small_pipe().to("cuda")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by an entry whenever a graph is recorded."""
    recordings: list[str] = []
    record = CudaDevice.record
    monkeypatch.setattr(CudaDevice, "record", lambda self, run: recordings.append("graph") or record(self, run))
    return recordings


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3 * expected.abs().max().item())


def test_with_every_step_a_key_step_eager_draws_stock_s_image(cuda_pipe: Any) -> None:
    fdcompile.restore(cuda_pipe)
    expected = sample(cuda_pipe)
    fdcompile.optimize(cuda_pipe, Config(key_steps="all", backend="eager"))
    assert_close(sample(cuda_pipe), expected)


def test_replayed_graphs_equal_eager_from_the_first_image_to_the_third(cuda_pipe: Any, recorded: list[str]) -> None:
    fdcompile.optimize(cuda_pipe, Config(**CONFIG, backend="eager"))
    expected = [sample(cuda_pipe, seed=seed) for seed in range(3)]
    fdcompile.optimize(cuda_pipe, Config(**CONFIG, backend="inductor"))
    actual = [sample(cuda_pipe, seed=0)]
    assert recorded
    recorded.clear()
    actual += [sample(cuda_pipe, seed=seed) for seed in (1, 2)]
    assert not recorded, "the first image records all"
    assert not fdcompile.explain(cuda_pipe).backend_notes
    for image, eager in zip(actual, expected, strict=True):
        assert_close(image, eager)


def test_nothing_is_recorded_after_a_warmup_in_any_mode(cuda_pipe: Any, recorded: list[str]) -> None:
    fdcompile.restore(cuda_pipe)
    fdcompile.optimize(cuda_pipe, Config(**CONFIG, backend="inductor"))
    with torch.inference_mode():
        fdcompile.warmup(cuda_pipe, [(8, 8)], num_inference_steps=10, guidance_scale=5.0, **TEXTS)
    recorded.clear()
    first = sample(cuda_pipe)
    with torch.inference_mode():
        second = sample(cuda_pipe)
    assert not recorded
    torch.testing.assert_close(first, second)


def test_without_graphs_and_with_other_settings_the_image_is_the_same(cuda_pipe: Any, recorded: list[str]) -> None:
    fdcompile.optimize(cuda_pipe, Config(**CONFIG, backend="eager"))
    expected = sample(cuda_pipe)
    backend = InductorBackend(cuda_graphs=False, options={"epilogue_fusion": False})
    fdcompile.optimize(cuda_pipe, Config(**CONFIG, backend=backend))
    assert_close(sample(cuda_pipe), expected)
    assert not recorded


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_weights_written_between_images_count_at_once(cuda_pipe: Any, backend: str) -> None:
    fdcompile.optimize(cuda_pipe, Config(**CONFIG, backend=backend))
    expected = sample(cuda_pipe)
    weights = list(cuda_pipe.unet.parameters())
    for weight in weights:
        weight.data *= 1.05
    changed = sample(cuda_pipe)
    assert (changed - expected).abs().max() > 1e-3
    for weight in weights:
        weight.data /= 1.05
    assert_close(sample(cuda_pipe), expected)


def test_kernels_are_channels_last_until_restored(cuda_pipe: Any) -> None:
    fdcompile.restore(cuda_pipe)
    kernel = cuda_pipe.unet.conv_in.weight
    assert kernel.is_contiguous()
    fdcompile.optimize(cuda_pipe, Config(**CONFIG, backend="inductor"))
    session: Any = find_session(cuda_pipe)
    sample(cuda_pipe)
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    (staged,) = session.executor.runner_cache.runners.values()
    shapes = []
    decoder = staged._lowered["decoder"]
    staged._lowered["decoder"] = lambda *arguments: shapes.extend(map(_layout, arguments)) or decoder(*arguments)
    sample(cuda_pipe)
    assert shapes.count("contiguous") == 0, "features reach the decoder as convolutions want them"
    fdcompile.restore(cuda_pipe)
    assert kernel.is_contiguous()


def _layout(tensor: Tensor) -> str:
    if tensor.ndim != 4 or min(tensor.shape[2:]) == 1 or tensor.shape[1] == 4:  # no feature map: keys, values, times
        return "other"
    return "channels_last" if tensor.is_contiguous(memory_format=torch.channels_last) else "contiguous"


def test_a_scalar_on_the_cpu_is_read_at_every_replay() -> None:
    graph_module = torch.fx.symbolic_trace(_Scaled())
    stage = InductorBackend().lower(graph_module, "stage")
    x = torch.ones(8, device="cuda")
    for value in (2.0, 3.0, 4.0):
        torch.testing.assert_close(stage(x, torch.tensor(value))[0], value * x)


class _Scaled(nn.Module):
    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor]:
        return (x * scale,)


def test_another_thread_may_allocate_and_wait_while_a_graph_is_recorded() -> None:
    recording, done = threading.Event(), threading.Event()
    calls: list[int] = []

    def run(x: Tensor) -> tuple[Tensor, ...]:
        calls.append(1)
        y = x * 2
        if len(calls) == 2:
            recording.set()
            done.wait(30)
        return (y + 1,)

    def other() -> None:
        recording.wait(30)
        torch.empty(64 << 20, device="cuda").fill_(0).sum().item()
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    x = torch.ones(8, device="cuda")
    graphs = CudaGraphs(run, [], cuda_device(x.device))
    results = [graphs(x)[0] for _ in range(3)]
    thread.join()
    assert not graphs.notes
    torch.testing.assert_close(torch.stack(results), torch.full((3, 8), 3.0, device="cuda"))


def test_calls_on_several_streams_do_not_disturb_each_other() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    weight = torch.randn(2048, 2048, device=device)
    graphs = [CudaGraphs(lambda x: (x @ weight @ weight,), [weight], cuda_device(device)) for _ in range(2)]
    inputs = torch.randn(8, 2048, 2048, device=device)
    expected = [x @ weight @ weight for x in inputs]
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for number, x in enumerate(inputs):
        with torch.cuda.stream(streams[number % 2]):
            results.append(graphs[number // 2 % 2](x)[0])
    torch.cuda.synchronize()
    for actual, alone in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, alone, rtol=1e-4, atol=1e-2 * alone.abs().max().item())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_pipe_on_the_second_device_while_the_first_is_current() -> None:
    pipe = small_pipe().to("cuda:1")
    fdcompile.optimize(pipe, Config(**CONFIG, backend="eager"))
    expected = [sample(pipe, seed=seed) for seed in range(2)]
    fdcompile.optimize(pipe, Config(**CONFIG, backend="inductor"))
    for seed in range(2):
        assert_close(sample(pipe, seed=seed), expected[seed])


def test_model_offload_draws_the_same_and_gives_up_on_graphs() -> None:
    pipe = small_pipe()
    pipe.enable_model_cpu_offload()
    fdcompile.optimize(pipe, Config(**CONFIG, backend="eager"))
    expected = sample(pipe)
    fdcompile.optimize(pipe, Config(**CONFIG, backend="inductor"))
    for _ in range(4):
        assert_close(sample(pipe), expected)


def test_parallel_decoding_stays_within_its_memory_budget(cuda_pipe: Any) -> None:
    peaks = []
    for steps in (1, "auto"):
        config = Config.paper(max_parallel_steps=steps, memory_budget=0.15, backend="eager")
        fdcompile.optimize(cuda_pipe, config)
        sample(cuda_pipe, steps=20, batch=4)
        torch.cuda.reset_peak_memory_stats()
        sample(cuda_pipe, steps=20, batch=4)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.15 * peaks[0]


@pytest.mark.parametrize("format", ["aot_inductor", "onnx"])
def test_packages_draw_the_images_of_the_eager_pipe(format: Any, cuda_pipe: Any, tmp_path: Path) -> None:
    """ONNX with onnxruntime-gpu; without it the stages run on the CPU, with a warning."""
    if format == "onnx" and importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("onnxruntime is not installed: pip install 'fdcompile[onnx]' onnxruntime-gpu")
    fdcompile.optimize(cuda_pipe, Config.paper(max_parallel_steps=16, backend="eager"))
    expected = sample(cuda_pipe, batch=2)
    fdcompile.export(cuda_pipe, tmp_path / "package", format=format, arguments=TEXTS)
    fdcompile.load(cuda_pipe, tmp_path / "package")
    for _ in range(2):
        assert_close(sample(cuda_pipe, batch=2), expected)
