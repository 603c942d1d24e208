"""What only a CUDA device can show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import TEXTS, sample, small_pipe

import fdcompile
from fdcompile import Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def cuda_pipe() -> Any:
    return small_pipe().to("cuda")


def test_replayed_graphs_equal_eager_from_the_first_image_to_the_third(cuda_pipe: Any) -> None:
    config = {"key_steps": (0, 1, 4), "max_parallel_steps": 3}
    fdcompile.optimize(cuda_pipe, Config(**config, backend="eager"))
    expected = [sample(cuda_pipe, seed=seed) for seed in range(3)]
    fdcompile.optimize(cuda_pipe, Config(**config, backend="inductor"))
    actual = [sample(cuda_pipe, seed=seed) for seed in range(3)]
    for image, eager in zip(actual, expected, strict=True):
        torch.testing.assert_close(image, eager, rtol=0, atol=1e-3 * eager.abs().max().item())


def test_parallel_decoding_stays_within_its_memory_budget(cuda_pipe: Any) -> None:
    peaks = []
    for steps in (1, "auto"):
        fdcompile.optimize(cuda_pipe, Config(max_parallel_steps=steps, backend="eager"))
        sample(cuda_pipe, steps=20, batch=4)
        torch.cuda.reset_peak_memory_stats()
        sample(cuda_pipe, steps=20, batch=4)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.15 * peaks[0]


@pytest.mark.parametrize("format", ["aot_inductor", "onnx"])
def test_packages_draw_the_pictures_of_the_eager_pipe(format: Any, cuda_pipe: Any, tmp_path: Path) -> None:
    """ONNX with onnxruntime-gpu; without it the stages run on the CPU, with a warning."""
    fdcompile.optimize(cuda_pipe, Config(max_parallel_steps=16, backend="eager"))
    expected = sample(cuda_pipe, batch=2)
    fdcompile.export(cuda_pipe, tmp_path / "package", format=format, arguments=TEXTS)
    fdcompile.load(cuda_pipe, tmp_path / "package")
    for _ in range(2):
        torch.testing.assert_close(
            sample(cuda_pipe, batch=2), expected, rtol=0, atol=1e-3 * expected.abs().max().item()
        )
