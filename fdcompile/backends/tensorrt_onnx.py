"""Package the stages as TensorRT engines that take other weights: built by TensorRT's own ONNX parser."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fdcompile.backends.engine_build import build_engine
from fdcompile.backends.onnx import write_onnx
from fdcompile.backends.protocols import WeightSource
from fdcompile.backends.stored import StageExport, check_installed, write_constants
from fdcompile.backends.tensorrt import TensorRT, check_tensorrt


class TensorRTOnnx(TensorRT):
    """One refittable engine for each stage.

    The graph that the parser reads names each weight by its place in the UNet, and so does the engine. All of them are
    replaced at once, so that nothing of an earlier adapter is left. Engines that can be refitted lack some fusions.
    """

    weights: WeightSource = "copied"

    def check(self) -> None:
        check_installed("Engines by the ONNX parser", "onnx", "onnx", "onnxscript")
        check_tensorrt()

    def write(self, stages: Sequence[StageExport], folder: Path, progress: Callable[[str], None]) -> None:
        super().write(stages, folder, progress)
        write_constants(stages, folder)

    def build(self, stage: StageExport, timings: Path) -> bytes:
        """The engine of `stage`.

        Raises:
            RuntimeError: as `build_engine`.
        """
        import tensorrt

        caches = []

        def configure(network: Any, config: Any) -> None:
            config.set_flag(tensorrt.BuilderFlag.REFIT)
            caches.append(config.create_timing_cache(timings.read_bytes() if timings.is_file() else b""))
            config.set_timing_cache(caches[0], False)

        with tempfile.TemporaryDirectory() as scratch:  # the network reads its weights from there until it is built
            path = Path(scratch) / f"{stage.name}.onnx"
            write_onnx(stage, path)
            engine = build_engine(tensorrt, stage, path, configure)
        timings.write_bytes(memoryview(caches[0].serialize()))
        return engine


FORMAT = TensorRTOnnx()
