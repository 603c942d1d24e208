"""What is written as ONNX computes what the stage does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import onnxruntime
import pytest
import torch
from planted import plant
from torch import Tensor, nn

from fdcompile.backends import onnx
from fdcompile.backends.compare import largest_error
from fdcompile.backends.onnx import FORMAT
from fdcompile.backends.stored import StageExport


class Joins(nn.Module):
    """The ways to make one tensor of several, of different types."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        half = x.half()
        return (
            torch.cat([half, x, half], -1),
            torch.concat([x, half]),
            torch.concatenate([half, half]),
            torch.stack([half, x]),
            torch.hstack([half, x]),
            torch.vstack([x.int(), half]),
            torch.column_stack([half, x]),
            torch.where(x > 0, x, half) + half,
        )


def test_types_are_promoted_where_tensors_are_joined(tmp_path: Path) -> None:
    stage = plant(Joins())
    before = str(stage.program.graph)
    error, _ = opened(stage, tmp_path)
    assert error == 0
    assert str(stage.program.graph) == before, "the stage itself is left as it was"


def opened(stage: StageExport, folder: Path) -> tuple[float, torch.dtype]:
    FORMAT.write([stage], folder, lambda line: None)
    lowered = FORMAT.open(folder, {stage.name: stage.packaged}, {}, torch.device("cpu"))
    return largest_error(stage, lowered[stage.name])


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Onnxruntime's plug-in of TensorRT for RTX, but for the library, which needs a driver to be loaded."""
    module = ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    vars(module).update(get_ep_name=lambda: "NvTensorRTRTXExecutionProvider", get_library_path=lambda: "/none/rtx.so")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    onnx._rtx_devices.cache_clear()
    yield module
    onnx._rtx_devices.cache_clear()


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (2 * x,)


def test_without_a_card_the_cpu_runs_it_and_says_why(plugin: ModuleType, tmp_path: Path) -> None:
    """What onnxruntime itself says of a plug-in that cannot be loaded."""
    FORMAT.write([stage := plant(Doubled())], tmp_path, lambda line: None)
    with pytest.warns(UserWarning) as told:
        session = onnx.Session(tmp_path / "planted.onnx", stage.packaged, torch.device("cuda"))
    first, second = (str(warning.message) for warning in told)
    assert "plug-in of TensorRT for RTX cannot be used here: " in first
    assert "/none/rtx.so" in first
    assert "the CPU runs stage 'planted'" in second
    assert largest_error(stage, session)[0] == 0


def test_a_plug_in_that_finds_a_device_runs_it(
    plugin: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """The provider for CPUs plays it."""
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda name, path: None)
    monkeypatch.setattr(plugin, "get_ep_name", lambda: "CPUExecutionProvider")
    FORMAT.write([stage := plant(Doubled())], tmp_path, lambda line: None)
    recwarn.clear()
    session = onnx.Session(tmp_path / "planted.onnx", stage.packaged, torch.device("cuda"))
    assert largest_error(stage, session)[0] == 0
    assert [str(warning.message) for warning in recwarn if "onnxruntime" in str(warning.message)] == []
