"""All of TensorRT's path that needs neither its builder nor a GPU. What is found is the table in docs/tensorrt.md."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from models import TEXTS, sample, small_pipe
from tables import Table

import fdcompile
from fdcompile.backends import engine, tensorrt
from fdcompile.backends.engine import Engine
from fdcompile.backends.engine_cache import CACHE_VARIABLE

DAILY = "the least UNet that has all stages, fixed"
"""The one that `make test` lowers; `make tables` lowers those of the table, which takes minutes."""

MODELS = (
    "Stable Diffusion 1.5, all layers, any size",
    "Stable Diffusion, text to image, fixed",
    "Stable Diffusion, text to image, forecast",
    "Stable Diffusion XL, all layers, any size",
    "ControlNet",
    "DeepFloyd IF, stage 1",
)

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("torch_tensorrt") is None or not torch.__version__.startswith("2.13"),
    reason="needs the torch-tensorrt wheel, which `make test` installs, and the torch it is made for, 2.13",
)


HERE = Path(__file__).parent
FOLDERS = (HERE, HERE.parent / "zoo", HERE.parent, HERE.parents[1])


@functools.cache
def dry_run(model: str) -> dict[str, Any]:
    """What `tensorrt_dry_run.py` prints last. The stand-in for TensorRT must not stay in this process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, FOLDERS))}
    command = [sys.executable, "-W", "ignore", str(HERE / "tensorrt_dry_run.py"), model]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    printed: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return printed


@needs_wheel
@pytest.mark.parametrize("model", [DAILY, *(pytest.param(model, marks=pytest.mark.tables) for model in MODELS)])
def test_every_stage_lowers_to_one_engine(model: str, tensorrt_table: Table) -> None:
    """Nothing unsupported, one partition, the profile that was asked for, and the same numbers after lowering."""
    for name, stage in dry_run(model)["stages"].items():
        assert (stage["unsupported"], stage["partitions"], stage["in torch"]) == (0, 1, []), name
        assert stage["names"], "the engine's inputs are called as the stage's"
        shapes = [list(sizes.values()) if isinstance(sizes, dict) else sizes for sizes in stage["profile"]]
        assert shapes == stage["asked"]
        assert stage["error"] < 1e-4, name
        cells = (f"{stage['operations']}", f"{stage['unsupported']}", f"{stage['partitions']}", *stage["axes"])
        if model != DAILY:
            tensorrt_table.check(f"{model}: {name}", *cells)


@needs_wheel
@pytest.mark.tables
def test_the_table_lists_nothing_else(tensorrt_table: Table) -> None:
    tensorrt_table.keep([f"{model}: {name}" for model in MODELS for name in dry_run(model)["stages"]])


@needs_wheel
def test_what_cannot_be_lowered_is_noticed() -> None:
    assert sum(dry_run(DAILY)["unsupported"].values()) >= 1


@needs_wheel
def test_the_functions_used_still_take_what_they_are_given() -> None:
    """They swallow arguments that they do not know."""
    parameters = set(dry_run(DAILY)["arguments"])
    assert {*tensorrt.SETTINGS, "exported_program", "arg_inputs", "timing_cache_path"} <= parameters


class FakeEngine:
    """The part of TensorRT's engine and context that `Engine` uses: one output, twice its input."""

    num_io_tensors = 2
    device_memory_size_v2 = 64
    names = ("x", "output0")

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()
        self.ran_on: list[int] = []

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "x" else "out"

    def get_tensor_dtype(self, name: str) -> str:
        return "float"

    def create_execution_context(self, strategy: str) -> FakeEngine:
        return self

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.device_memory_size_v2

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return shape[0] <= 4

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def execute_async_v3(self, stream: int) -> bool:
        import ctypes
        import math

        floats = ctypes.c_float * math.prod(self.shape)
        source, target = (floats.from_address(self.addresses[name]) for name in self.names)
        for index, value in enumerate(source):
            target[index] = 2 * value
        self.ran_on.append(stream)
        return True


class FakeTensorRT(ModuleType):
    """Its part of TensorRT's module; `made` is what the runtime reads whatever it is given as."""

    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    DataType = SimpleNamespace(FLOAT="float", HALF="half", BF16="bf16", INT64="int64", INT32="int32", BOOL="bool")
    ILogger = type("ILogger", (), {})

    def __init__(self, made: FakeEngine | None) -> None:
        super().__init__("tensorrt")
        self.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=lambda serialized: made)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    monkeypatch.setattr(engine, "_side_stream", lambda d: contextlib.nullcontext(SimpleNamespace(cuda_stream=7)))
    return FakeEngine()


def read(made: FakeEngine | None, *names: str) -> Engine:
    return Engine(FakeTensorRT(made), b"", names)


def ready(run: Engine) -> Engine:
    run.use(torch.empty(run.scratch, dtype=torch.uint8))
    return run


def test_an_engine_runs_on_the_tensors_themselves(fake: FakeEngine) -> None:
    """Inputs by name, those that the engine has dropped left out; strided ones made contiguous; the stream not 0."""
    run = ready(read(fake, "unused", "x"))
    x = torch.arange(6.0).reshape(2, 3)
    (output,) = run(torch.zeros(1), x)
    assert torch.equal(output, 2 * x)
    assert fake.addresses == {"x": x.data_ptr(), "output0": output.data_ptr()}
    (transposed,) = run(torch.zeros(1), x.T)
    assert torch.equal(transposed, 2 * x.T)
    assert torch.equal(output, 2 * x), "a later call does not overwrite it"
    assert fake.ran_on == [7, 7]


def test_an_engine_refuses_what_it_was_not_built_for(fake: FakeEngine) -> None:
    with pytest.raises(ValueError, match=r"x: shape \(5, 3\) is outside of the engine's profile"):
        ready(read(fake, "x"))(torch.zeros(5, 3))
    with pytest.raises(RuntimeError, match=r"the engine reads \['x'\], which its stage does not"):
        read(fake, "y")
    with pytest.raises(RuntimeError, match=r"the engine returns \['output0'\], its stage \['y'\]"):
        Engine(FakeTensorRT(fake), b"", ["x"], outputs=["y"])
    with pytest.raises(RuntimeError, match="another version or for another GPU"):
        read(None, "x")


def test_without_tensorrt_the_export_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ImportError, match=r"TensorRT engines need .*tensorrt: pip install"):
        fdcompile.export(small_pipe(), tmp_path / "package", format="tensorrt", arguments=TEXTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is None or not torch.cuda.is_available(),
    reason="needs TensorRT's builder and a CUDA device",
)
@pytest.mark.parametrize("format", ["tensorrt", "tensorrt_onnx"])
def test_engines_draw_the_images_of_the_eager_pipe(
    format: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    pipe, twin = small_pipe().to("cuda"), small_pipe().to("cuda")
    fdcompile.export(pipe, tmp_path / "package", format=format, arguments=TEXTS)
    fdcompile.load(pipe, tmp_path / "package")
    fdcompile.optimize(twin, fdcompile.Config(backend="eager", max_parallel_steps=16))
    for refitted in (False, True)[: 2 if format == "tensorrt_onnx" else 1]:
        if refitted:
            for each in (pipe, twin):
                each.unet.up_blocks[0].resnets[0].conv1.weight.data.mul_(1.1)
        expected = sample(twin, batch=2)
        for _ in range(3):  # as it is, recorded, replayed
            torch.testing.assert_close(sample(pipe, batch=2), expected, rtol=0, atol=1e-2 * float(expected.abs().max()))
