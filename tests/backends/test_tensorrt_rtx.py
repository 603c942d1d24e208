"""Engines of TensorRT for RTX by its real parser, builder and runtime: all but running them, which needs a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TEXTS, flat_pipe, lora, sample
from package.conftest import edit
from planted import plant
from torch import nn

import fdcompile
from fdcompile import Config, PackageError
from fdcompile.backends import engine_cache, tensorrt_rtx
from fdcompile.backends.engine import Engine
from fdcompile.backends.engine_build import build_engine
from fdcompile.backends.engine_log import LOGGER
from fdcompile.backends.onnx import write_onnx
from fdcompile.backends.stored import StageExport
from fdcompile.backends.tensorrt_rtx import FORMAT, TARGETS, invalidity
from fdcompile.backends.tensorrt_rtx_refit import TensorRTRTXRefit
from fdcompile.capture.export import capture_widest
from fdcompile.graph.ranges import Range
from fdcompile.graph.weights import tensor_bytes
from fdcompile.io import atomic_directory
from fdcompile.package.manifest import Manifest
from fdcompile.package.stages import stage_exports
from fdcompile.passes import run_passes
from fdcompile.pipeline.identity import weights_digest
from fdcompile.pipeline.record import record_call

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="needs TensorRT for RTX: pip install 'fdcompile[tensorrt-rtx]'",
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEADER = 64


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(engine_cache.CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


def fused_pipe() -> Any:
    """In float16, with a LoRA fused into it."""
    pipe = flat_pipe()
    pipe.load_lora_weights(lora(pipe.unet, seed=1, scale=0.1))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.unet.half()
    return pipe


HALF_TEXTS = {name: text.half() for name, text in TEXTS.items()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A package of `fused_pipe`, and what was said while it was made."""
    told: list[str] = []
    folder = tmp_path_factory.mktemp("packages") / "package"
    options: dict[str, Any] = {"batch": (1, 1, 3), "target": ["sm120", "sm89"]}
    fdcompile.export(fused_pipe(), folder, format="tensorrt_rtx", arguments=HALF_TEXTS, progress=told.append, **options)
    return folder, told


@pytest.fixture(scope="module")
def prompt() -> StageExport:
    """The smallest stage of a pipe, for two of whose latents it is exported."""
    call = record_call(pipe := flat_pipe(), None, None, TEXTS)
    _, captured = capture_widest(pipe.unet, call)
    program = run_passes(captured, Config.paper().recompute)
    return stage_exports(
        replace(program, stages={"prompt": program.stages["prompt"]}), Range(1, 2, 6), Range(1, 3, 16)
    )[0]


def write(stage: StageExport, folder: Path) -> None:
    """What `export` does with each stage, of a package or nothing."""
    with atomic_directory(folder) as partial:
        FORMAT.write([stage], partial, lambda line: None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, which is empty."""
    monkeypatch.setenv(engine_cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def test_a_package_is_exported_without_a_gpu(exported: tuple[Path, list[str]]) -> None:
    folder, told = exported
    assert told[-1] == "the engines were not run, since that needs their GPU; the graphs that they are built from were"
    manifest = Manifest.read(folder)
    engines = {f"{name}.engine": (folder / f"{name}.engine").read_bytes() for name in manifest.stages}
    assert manifest.description["targets"] == ["sm89", "sm120"]
    assert manifest.description["headers"] == {name: engine[:HEADER].hex() for name, engine in engines.items()}
    assert manifest.made_with == {"fdcompile": fdcompile.__version__, "tensorrt_rtx": metadata.version("tensorrt_rtx")}
    assert {path.name for path in folder.iterdir()} == {*engines, "manifest.json"}
    manifest.check_files(folder)


def test_engines_hold_the_weights_of_the_fused_lora(exported: tuple[Path, list[str]]) -> None:
    folder, _ = exported
    fused, plain = fused_pipe().unet, flat_pipe().unet.half()
    assert Manifest.read(folder).unet["weights"] == weights_digest(fused) != weights_digest(plain)
    engine = (folder / "prompt.engine").read_bytes()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    held = [bytes(tensor_bytes(unet.get_parameter(name).T)) in engine for unet in (fused, plain)]
    assert held == [True, False], "as the builder lays it out"


def test_load_refuses_before_it_reads_the_engines(
    exported: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, of another version, and damaged where the header or only the file behind it is."""
    package, _ = exported
    monkeypatch.setattr("fdcompile.package.manifest.file_digest", lambda path: pytest.fail("it was read"))
    pipe = fused_pipe()
    with pytest.raises(PackageError, match=r"built for \['sm89', 'sm120'\], .* needs an NVIDIA RTX GPU: pipe\.to"):
        fdcompile.load(pipe, package)

    folder = tmp_path / "copy"
    folder.mkdir()
    for path in package.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    engine = folder / "decoder.engine"
    engine.write_bytes(b"no engine" + engine.read_bytes())
    with pytest.raises(PackageError, match=r"decoder\.engine is damaged: it does not begin as the manifest says"):
        fdcompile.load(pipe, folder)
    header = engine.read_bytes()[:HEADER].hex()
    edit(folder, lambda values: values["description"]["headers"].update({"decoder.engine": header}))
    with pytest.raises(PackageError, match=r"decoder\.engine, .* MALFORMED_ENGINE: it is damaged, export again"):
        fdcompile.load(pipe, folder)
    edit(folder, lambda values: values.update(description={}))
    with pytest.raises(PackageError, match="is damaged"):
        fdcompile.load(pipe, folder)
    edit(folder, lambda values: values["made_with"].update(tensorrt_rtx="1.6.0.90"))
    with pytest.raises(PackageError, match=r"tensorrt_rtx: the package has 1\.6\.0\.90, the pipe 1\."):
        fdcompile.load(pipe, folder)
    assert vars(pipe).keys() == vars(fused_pipe()).keys(), "nothing was installed"


def test_the_runtime_tells_what_it_can_without_a_gpu(exported: tuple[Path, list[str]]) -> None:
    """That it is an engine at all; and then that there is no driver, with its own words."""
    import tensorrt_rtx as trt

    engine = (exported[0] / "prompt.engine").read_bytes()
    good = engine[:HEADER]
    for damaged in (b"", good[:40], bytes(HEADER), b"\0" + good[1:]):
        assert invalidity(damaged, CUDA).startswith("MALFORMED_ENGINE: it is damaged"), damaged
    assert "RTX GPU" in invalidity(good, CPU)
    if torch.cuda.is_available():
        pytest.skip("what follows is for machines without a GPU")
    assert "CUDA driver version is insufficient" in invalidity(good, CUDA)
    with pytest.raises(RuntimeError, match=r"could not read an engine: .*CUDA driver version is insufficient"):
        Engine(trt, engine, ["encoder_hidden_states"])


def test_targets(prompt: StageExport, cache: Path, tmp_path: Path) -> None:
    import tensorrt_rtx as trt

    assert {name.upper() for name in TARGETS} == trt.ComputeCapability.__members__.keys() - {"NONE", "CURRENT"}
    with pytest.raises(ValueError, match=r"target=sm90: expected some of sm75, sm80"):
        fdcompile.export(flat_pipe(), tmp_path / "package", format="tensorrt_rtx", target=["sm89", "sm90"])
    with pytest.raises(ValueError, match=r"target=sm89: only tensorrt_rtx and tensorrt_rtx_refit build for"):
        fdcompile.export(flat_pipe(), tmp_path / "package", format="onnx", target=["sm89"])
    for number, targets in enumerate((["sm121"], TARGETS[1:]), start=1):
        FORMAT.for_targets(targets).write([prompt], tmp_path, lambda line: None)
        assert len(list(cache.iterdir())) == number, "one for each choice"
    with pytest.raises(RuntimeError, match=r"could not build stage 'prompt': .* FP32 GEMM is not supported"):
        FORMAT.for_targets(["sm75"]).write([prompt], tmp_path, lambda line: None)


@pytest.mark.parametrize(
    ("capability", "targets", "runs"),
    [
        ((8, 9), [], True),
        ((7, 5), [], False),
        ((9, 0), [], False),
        ((8, 9), ["sm120"], False),
        ((7, 5), ["sm75"], True),
    ],
)
def test_engines_are_compared_where_they_run(
    capability: tuple[int, int], targets: list[str], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert FORMAT.for_targets(targets).runs_on(CUDA) is runs
    assert not FORMAT.for_targets(targets).runs_on(CPU)


class Determinant(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + torch.linalg.det(x),)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (2 * x,)


def test_an_operation_that_the_parser_does_not_know_is_named(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"tensorrt_rtx's ONNX parser refuses stage 'planted': Det \(node"):
        write(plant(Determinant()), tmp_path / "package")
    assert list(tmp_path.iterdir()) == [cache]
    assert list(cache.iterdir()) == []


def test_a_graph_that_differs_is_not_built(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = plant(Doubled())
    other = plant(Determinant())
    monkeypatch.setattr(tensorrt_rtx, "write_onnx", lambda stage, path: write_onnx(other, path))
    with pytest.raises(PackageError, match="stage planted as written differs from its graph"):
        write(planted, tmp_path / "package")
    assert list(tmp_path.iterdir()) == [cache]


def test_a_network_with_other_names_or_types_is_not_built(tmp_path: Path) -> None:
    import tensorrt_rtx as trt

    stage = plant(Doubled())
    write_onnx(stage, path := tmp_path / "planted.onnx")
    assert build_engine(trt, stage, path, lambda network, config: None)
    (x,), (y,) = stage.packaged.inputs, stage.packaged.outputs
    for changes in (
        {"inputs": (replace(x, name="z"),)},
        {"inputs": (replace(x, dtype=torch.float16),)},
        {"outputs": (replace(y, name="z"),)},
        {"outputs": (replace(y, dtype=torch.int64),)},
        {"outputs": ()},
    ):
        other = replace(stage, packaged=replace(stage.packaged, **changes))
        with pytest.raises(RuntimeError, match=r"stage 'planted': the parsed network (reads|returns)"):
            build_engine(trt, other, path, lambda network, config: None)


class _AtMessage(logging.Handler):
    """Calls `act` when TensorRT says something for the `number`-th time."""

    def __init__(self, number: int, act: Callable[[], None]) -> None:
        super().__init__(logging.DEBUG)
        self.left = number
        self.act = act

    def emit(self, record: logging.LogRecord) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()


@contextlib.contextmanager
def at_message(number: int, act: Callable[[], None]) -> Iterator[_AtMessage]:
    handler, level = _AtMessage(number, act), LOGGER.level
    LOGGER.setLevel(logging.DEBUG)
    LOGGER.addHandler(handler)
    yield handler
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(level)


@pytest.mark.parametrize("number", [1, 3])
def test_ctrl_c_while_tensorrt_works_leaves_nothing(
    number: int, prompt: StageExport, cache: Path, tmp_path: Path, interruptible: None
) -> None:
    """Also where it comes while TensorRT calls into Python, and swallows what is raised there."""
    before = signal.getsignal(signal.SIGINT)
    interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    with at_message(number, interrupt) as handler, pytest.raises(KeyboardInterrupt):
        write(prompt, tmp_path / "package")
    assert handler.left <= 0, "it was interrupted there"
    assert list(tmp_path.iterdir()) == [cache]
    assert list(cache.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is before
    write(prompt, tmp_path / "package")
    assert (tmp_path / "package" / "prompt.engine").is_file()


def test_a_thread_builds_as_well(prompt: StageExport, cache: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=write, args=(prompt, tmp_path / "package"))
    thread.start()
    thread.join()
    assert (tmp_path / "package" / "prompt.engine").is_file()


@pytest.mark.parametrize("room", [2000, 50_000])
def test_a_full_disk_leaves_nothing(room: int, prompt: StageExport, cache: Path, tmp_path: Path) -> None:
    """Files that may be no longer than this: neither the ONNX graph fits, or the engine does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        with pytest.raises(OSError, match="File too large"):
            write(prompt, tmp_path / "package")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [cache]
    assert list(cache.iterdir()) == []


def test_the_second_of_two_exports_into_one_folder_is_refused(prompt: StageExport, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "package"
    with pytest.raises(FileExistsError, match="package has been filled meanwhile"), atomic_directory(folder) as partial:
        FORMAT.write([prompt], partial, lambda line: None)
        write(prompt, folder)  # another, which is done sooner
        kept = (folder / "prompt.engine").read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["cache", "package"]
    assert (folder / "prompt.engine").read_bytes() == kept


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_refittable_engines_are_built_with_a_gpu_only(prompt: StageExport, cache: Path, tmp_path: Path) -> None:
    """Parsed, and all weights marked, without one; `export` refuses before that."""
    marked: list[bool] = []

    class Watched(TensorRTRTXRefit):
        def configure(self, stage: StageExport, network: Any, config: Any) -> None:
            super().configure(stage, network, config)
            marked.extend(network.are_weights_marked_refittable(weight.name) for weight in stage.packaged.weights)

    with pytest.raises(RuntimeError, match=r"could not build stage 'prompt': .*CUDA"):
        Watched().write([prompt], tmp_path, lambda line: None)
    assert marked == [True] * len(prompt.packaged.weights)
    assert marked
    assert list(cache.iterdir()) == []
    with pytest.raises(ImportError, match="torch finds none here: format='tensorrt_rtx' builds engines with weights"):
        fdcompile.export(flat_pipe(), tmp_path / "package", format="tensorrt_rtx_refit")


class Attention(nn.Module):
    """In the type and with the head size that it is made for."""

    def __init__(self, dtype: torch.dtype, width: int) -> None:
        super().__init__()
        self.dtype, self.width = dtype, width

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        heads = x.to(self.dtype).reshape(1, 1, 9, 1).expand(1, 2, 9, self.width)
        return (nn.functional.scaled_dot_product_attention(heads, 2 * heads, heads + 1),)


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 8), (torch.float32, 512), (torch.float16, 4), (torch.bfloat16, 40)]
)
def test_attention_is_built_in_any_type(dtype: torch.dtype, width: int, cache: Path, tmp_path: Path) -> None:
    """Also where there is no kernel for it: as parsed the builder refuses it there."""
    told: list[str] = []
    FORMAT.write([plant(Attention(dtype, width))], tmp_path, told.append)
    assert (tmp_path / "planted.engine").stat().st_size > 1000
    in_float32 = "stage planted is compared in float32, because onnxruntime lacks bfloat16 on a CPU"
    assert told[1:] == ([in_float32] if dtype is torch.bfloat16 else [])


class Widened(nn.Module):
    """A constant, a weight, a cast and an input in bfloat16."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((3,), factor, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        table = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
        return (nn.functional.silu(x.to(torch.bfloat16) * self.factor + table),)


def test_a_graph_in_bfloat16_that_differs_is_not_built(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted, other = plant(Widened(2.0)), plant(Widened(-2.0))
    with monkeypatch.context() as patch:
        patch.setattr(tensorrt_rtx, "write_onnx", lambda stage, path: write_onnx(other, path))
        with pytest.raises(PackageError, match=r"stage planted as written differs .* are allowed in torch\.bfloat16"):
            write(planted, tmp_path / "package")
    write(planted, tmp_path / "package")


def test_the_module_has_all_that_running_an_engine_calls() -> None:
    import tensorrt_rtx as trt

    used = {
        trt.ICudaEngine: "num_io_tensors get_tensor_name get_tensor_mode get_tensor_dtype device_memory_size_v2 "
        "create_execution_context create_runtime_config",
        trt.IExecutionContext: "set_device_memory set_input_shape set_tensor_address infer_shapes get_tensor_shape "
        "execute_async_v3",
        trt.IRuntimeConfig: "create_runtime_cache set_runtime_cache set_execution_context_allocation_strategy "
        "dynamic_shapes_kernel_specialization_strategy cuda_graph_strategy",
        trt.IRuntimeCache: "serialize deserialize",
    }
    for kind, names in used.items():
        assert set(names.split()) <= set(dir(kind)), kind


class FakeRuntime:
    """The part of an engine, of its configuration and of its cache that needs a GPU."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.read: list[bytes] = []

    def create_runtime_config(self) -> FakeRuntime:
        return self

    create_runtime_cache = create_runtime_config

    def deserialize(self, content: bytes) -> bool:
        self.read.append(content)
        return True

    def serialize(self) -> bytes:
        return b"kernels"

    def set_runtime_cache(self, cache: FakeRuntime) -> None:
        self.config["cache"] = cache

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.config["memory"] = strategy

    def create_execution_context(self, config: FakeRuntime) -> tuple[Any, ...]:
        return self.config, self.cuda_graph_strategy, self.dynamic_shapes_kernel_specialization_strategy


def test_what_the_gpu_compiles_is_kept_for_each_package(cache: Path, tmp_path: Path) -> None:
    """By a stand-in: no context has been made by TensorRT yet."""
    import tensorrt_rtx as trt

    runtime, calls = FakeRuntime(), []
    first = tensorrt_rtx._RuntimeCache(tmp_path / "package", CPU, "1.7")
    assert first.create_context(runtime) == (
        {"cache": runtime, "memory": trt.ExecutionContextAllocationStrategy.USER_MANAGED},
        trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE,
        trt.DynamicShapesKernelSpecializationStrategy.EAGER,
    )
    run = first.saved_after(lambda x: (calls.append(len(list(cache.iterdir()))), x)[1:])
    for size, saved in ((2, True), (2, False), (3, True), (2, False)):
        run(torch.zeros(size))
        (path,) = cache.iterdir()
        assert (path.read_bytes() == b"kernels") is saved, "after new shapes only"
        path.write_bytes(b"")
    assert calls == [0, 1, 1, 1], "after the call"
    path.write_bytes(b"kernels")
    again = tensorrt_rtx._RuntimeCache(tmp_path / "package", CPU, "1.7")
    again.create_context(runtime)
    tensorrt_rtx._RuntimeCache(tmp_path / "other", CPU, "1.7").create_context(runtime)
    assert runtime.read == [b"kernels"]


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.skipif(not torch.cuda.is_available() or not FORMAT.runs_on(CUDA), reason="needs an RTX GPU")
@pytest.mark.parametrize("format", ["tensorrt_rtx", "tensorrt_rtx_refit"])
def test_engines_draw_the_images_of_the_eager_pipe(format: Any, cache: Path, tmp_path: Path) -> None:
    """Also where the card reads what it has compiled before, and with other weights where they can be refitted."""
    pipe, twin = flat_pipe().to("cuda"), flat_pipe().to("cuda")
    fdcompile.export(pipe, tmp_path / "package", format=format, arguments=TEXTS)
    fdcompile.optimize(twin, Config(backend="eager", max_parallel_steps=16))
    for number in range(2):
        if number == 1 and format == "tensorrt_rtx_refit":
            for each in (pipe, twin):
                each.unet.conv_out.weight.data.mul_(1.1)
        expected = sample(twin, batch=2)
        fdcompile.load(pipe, tmp_path / "package")
        for _ in range(3):  # captured, and replayed
            torch.testing.assert_close(sample(pipe, batch=2), expected, rtol=0, atol=1e-2 * float(expected.abs().max()))
        assert len(list(cache.glob("*.runtime"))) == 2, "one for the check at export, and the package's"
