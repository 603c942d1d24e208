"""Packages stages as TensorRT engines, built by torch-tensorrt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fdcompile.backends.cuda_graphs import CudaGraphs, cuda_device
from fdcompile.backends.engine import Engine, prepare_engines
from fdcompile.backends.protocols import Lowered, PackageFormat, WeightSource
from fdcompile.backends.stored import PackagedStage, StageExport, StageWeights, check_installed, device_name

SETTINGS: dict[str, Any] = {
    "require_full_compilation": True,
    "min_block_size": 1,
    "truncate_double": True,
    # Masks of the model are arbitrary, not causal.
    "attn_bias_is_causal": False,
    # Engines are built one at a time, and the UNet does not have to occupy the GPU meanwhile.
    "offload_module_to_cpu": True,
}
"""Settings of ``torch_tensorrt``: each stage is converted as a whole, with the types of the exported graph."""


class TensorRT(PackageFormat):
    """One engine for each stage, with its weights. All operations must be supported by TensorRT."""

    weights: WeightSource = "held"

    def check(self) -> None:
        check_tensorrt("torch_tensorrt")

    def made_with(self, device: torch.device) -> dict[str, str]:
        import tensorrt

        return {"tensorrt": tensorrt.__version__, "cuda": str(torch.version.cuda), "device": device_name(device)}

    def write(self, stages: Sequence[StageExport], folder: Path, progress: Callable[[str], None]) -> None:
        from fdcompile.backends.engine_cache import EngineCache

        device = next((example.device for stage in stages for example in stage.examples), torch.device("cuda"))
        cache = EngineCache(f"{type(self).__name__} {SETTINGS}", self.made_with(device))
        cache.write(stages, folder, progress, functools.partial(self.build, timings=cache.timings))

    def build(self, stage: StageExport, timings: Path) -> bytes:
        """Builds the engine of `stage`; `timings` is the file of TensorRT's timing cache."""
        import torch_tensorrt.dynamo

        engine: bytes = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            stage.program, arg_inputs=profile(stage), timing_cache_path=str(timings), **SETTINGS
        )
        return engine

    def open(
        self, folder: Path, stages: Mapping[str, PackagedStage], weights: StageWeights, device: torch.device
    ) -> dict[str, Lowered]:
        import tensorrt

        engines = {
            name: Engine(tensorrt, (folder / f"{name}.engine").read_bytes(), [port.name for port in stage.inputs])
            for name, stage in stages.items()
        }
        prepare_engines(engines, weights, device)
        return {name: CudaGraphs(engine, (), cuda_device(device)) for name, engine in engines.items()}


def check_tensorrt(*packages: str) -> None:
    """Raises ImportError if TensorRT, one of `packages` or a CUDA device is missing."""
    check_installed("TensorRT engines", "tensorrt", *packages, "tensorrt", "platformdirs")
    if not torch.cuda.is_available():
        raise ImportError("TensorRT engines need a CUDA device, and torch finds none here")


def profile(stage: StageExport) -> list[Any]:
    """Shapes that the engine of `stage` is built for, in the order of its inputs."""
    from torch_tensorrt import Input

    inputs = []
    for example, (low, usual, high) in zip(stage.examples, stage.shapes, strict=True):
        if low == high:
            inputs.append(Input(shape=tuple(usual), dtype=example.dtype))
        else:
            shapes = {"min_shape": tuple(low), "opt_shape": tuple(usual), "max_shape": tuple(high)}
            inputs.append(Input(**shapes, dtype=example.dtype))
    return inputs


FORMAT = TensorRT()
