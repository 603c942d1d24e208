"""Packages stages as engines of TensorRT for RTX, which can be built without a GPU for other machines."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdcompile.backends.compare import check_stage
from fdcompile.backends.engine import Engine, prepare_engines
from fdcompile.backends.engine_build import build_engine
from fdcompile.backends.engine_log import errors_of, log_of
from fdcompile.backends.onnx import Session, in_float32, write_onnx
from fdcompile.backends.protocols import Lowered, PackageFormat, WeightSource
from fdcompile.backends.stored import PackagedStage, StageExport, StageWeights, check_installed, device_name
from fdcompile.errors import PackageError
from fdcompile.io import atomic_write

TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""Compute capabilities that TensorRT for RTX supports."""


@dataclass(frozen=True)
class TensorRTRTX(PackageFormat):
    """One engine for each stage, with its weights. The GPU that runs it completes its compilation, once.

    Attributes:
        targets: entries of `TARGETS` to build for; empty for all from 8.0 on, which gives about the same size.
    """

    targets: tuple[str, ...] = ()
    weights: WeightSource = "held"

    def for_targets(self, targets: Sequence[str]) -> TensorRTRTX:
        if unknown := [target for target in targets if target not in TARGETS]:
            raise ValueError(f"target={','.join(unknown)}: expected some of {', '.join(TARGETS)}")
        return replace(self, targets=tuple(sorted(set(targets), key=TARGETS.index)))

    def check(self) -> None:
        packages = ("tensorrt_rtx", "platformdirs", "onnx", "onnxscript", "onnxruntime")
        check_installed("Engines of TensorRT for RTX", "tensorrt-rtx", *packages)

    def made_with(self, device: torch.device) -> dict[str, str]:
        import tensorrt_rtx

        return {"tensorrt_rtx": tensorrt_rtx.__version__}

    def runs_on(self, device: torch.device) -> bool:
        if device.type != "cuda":
            return False
        here = "sm{}{}".format(*torch.cuda.get_device_capability(device))
        return here in (self.targets or [target for target in TARGETS if target != "sm75"])

    def write(self, stages: Sequence[StageExport], folder: Path, progress: Callable[[str], None]) -> None:
        from fdcompile.backends.engine_cache import EngineCache

        cache = EngineCache(repr(self), self.made_with(torch.device("cpu")))
        cache.write(stages, folder, progress, functools.partial(self.build, progress=progress))

    def build(self, stage: StageExport, progress: Callable[[str], None]) -> bytes:
        """Builds the engine of `stage`, after a comparison of its ONNX graph, run by onnxruntime, with the stage.

        Raises:
            PackageError: the results of the ONNX graph differ.
            RuntimeError: see `build_engine`.
        """
        import tensorrt_rtx

        with tempfile.TemporaryDirectory() as scratch:  # the network reads its weights from there until it is built
            path = Path(scratch) / f"{stage.name}.onnx"
            write_onnx(stage, path)
            _compare(stage, path, progress)
            return build_engine(tensorrt_rtx, stage, path, functools.partial(self.configure, stage))

    def configure(self, stage: StageExport, network: Any, config: Any) -> None:
        """Changes the settings of the builder for `network`, the parsed graph of `stage`."""
        import tensorrt_rtx

        if self.targets:
            config.num_compute_capabilities = len(self.targets)
        for index, name in enumerate(self.targets):
            config.set_compute_capability(tensorrt_rtx.ComputeCapability.__members__[name.upper()], index)

    def describe(self, folder: Path) -> dict[str, Any]:
        return {
            "targets": list(self.targets) or "all from sm80 on",
            "headers": {path.name: _header(path).hex() for path in sorted(folder.glob("*.engine"))},
        }

    def check_files(self, folder: Path, description: Mapping[str, Any], device: torch.device) -> None:
        headers, targets = description.get("headers", {}), description.get("targets")
        for path in sorted(folder.glob("*.engine")):
            header = _header(path)
            if header.hex() != headers.get(path.name):
                raise PackageError(f"{path} is damaged: it does not begin as the manifest says: export again")
            if why := invalidity(header, device):
                raise PackageError(f"{path}, built for {targets}, cannot run on {device_name(device)}: {why}")

    def open(
        self, folder: Path, stages: Mapping[str, PackagedStage], weights: StageWeights, device: torch.device
    ) -> dict[str, Lowered]:
        import tensorrt_rtx

        cache = _RuntimeCache(folder, device, tensorrt_rtx.__version__)
        engines = {
            name: Engine(
                tensorrt_rtx,
                (folder / f"{name}.engine").read_bytes(),
                [port.name for port in stage.inputs],
                cache.create_context,
                [port.name for port in stage.outputs],
            )
            for name, stage in stages.items()
        }
        prepare_engines(engines, weights, device)
        return {name: cache.saved_after(engine) for name, engine in engines.items()}


def invalidity(header: bytes, device: torch.device) -> str:
    """Reason why an engine that begins with `header` cannot run on `device`, and a remedy; empty if it can.

    Without a GPU, TensorRT for RTX only detects malformed engines.
    """
    import tensorrt_rtx as trt

    with errors_of(trt) as errors:
        validity, bits = trt.Runtime(log_of(trt)).get_engine_validity(header)
    reasons = [name for name, reason in trt.EngineInvalidityDiagnostics.__members__.items() if bits & reason.value]
    if "MALFORMED_ENGINE" in reasons:
        return "MALFORMED_ENGINE: it is damaged, export again"
    if device.type != "cuda":
        return "it needs an NVIDIA RTX GPU: pipe.to('cuda')"
    if validity != trt.EngineValidity.INVALID:
        return ""
    hints = {
        "VERSION_MISMATCH": f"export with TensorRT for RTX {trt.__version__}, which is installed here",
        "UNSUPPORTED_CC": "export for this GPU (target=...), or in the format tensorrt if it is no RTX GPU",
        "OLD_CUDA_DRIVER": "update the driver",
    }
    told = "; ".join([*reasons, *errors]) or "TensorRT for RTX gives no reason"
    return f"{told}: {next((hints[reason] for reason in reasons if reason in hints), 'export again')}"


def _header(path: Path) -> bytes:
    import tensorrt_rtx as trt

    with path.open("rb") as file:
        return file.read(trt.Runtime(log_of(trt)).engine_header_size)


def _compare(stage: StageExport, path: Path, progress: Callable[[str], None]) -> None:
    """Compares the ONNX graph at `path` with `stage` at the smallest size, which fits into the memory of a laptop."""
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotRunnable

    cpu = torch.device("cpu")
    try:
        session = Session(path, stage.packaged, cpu)
    except NotRunnable:
        progress(f"stage {stage.name} is compared in float32, because onnxruntime lacks bfloat16 on a CPU")
        session = Session(in_float32(path), stage.packaged, cpu)
        check_stage(stage, lambda *arguments: session(*map(_widened, arguments)), which=0)
    else:
        check_stage(stage, session, which=0)


def _widened(argument: Tensor) -> Tensor:
    return argument.float() if argument.dtype is torch.bfloat16 else argument


class _RuntimeCache:
    """Cache on disk of the kernels that TensorRT for RTX compiles on `device` for the package in `folder`."""

    def __init__(self, folder: Path, device: torch.device, version: str) -> None:
        from fdcompile.backends.engine_cache import cache_folder

        about = f"{folder.resolve()} {device_name(device)} {version}"
        self._path = cache_folder() / f"{hashlib.sha256(about.encode()).hexdigest()}.runtime"
        self._cache: Any = None

    def create_context(self, engine: Any) -> Any:
        import tensorrt_rtx as trt

        config = engine.create_runtime_config()
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._path.is_file():
                self._cache.deserialize(self._path.read_bytes())  # False if it does not match: starts empty
        config.set_runtime_cache(self._cache)
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # Compile kernels for new shapes at once: a recorded graph would keep the fallback kernels.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return engine.create_execution_context(config)

    def saved_after(self, engine: Lowered) -> Lowered:
        """Wraps `engine` to save the cache after each call with new shapes."""
        seen: set[tuple[torch.Size, ...]] = set()

        def run(*arguments: Tensor) -> tuple[Tensor, ...]:
            outputs = engine(*arguments)
            if (shapes := tuple(argument.shape for argument in arguments)) not in seen:
                seen.add(shapes)
                with atomic_write(self._path) as partial:
                    partial.write_bytes(memoryview(self._cache.serialize()))
            return outputs

        return run


FORMAT = TensorRTRTX()
