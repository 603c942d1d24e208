"""Packages stages as refittable TensorRT engines, built with TensorRT's ONNX parser."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from fdcompile.backends.engine_build import build_engine
from fdcompile.backends.onnx import write_onnx
from fdcompile.backends.protocols import WeightSource
from fdcompile.backends.stored import StageExport, check_installed
from fdcompile.backends.tensorrt import TensorRT, check_tensorrt


class TensorRTOnnx(TensorRT):
    """One refittable engine for each stage.

    Weights have the same names in the ONNX graph and in the engine as in the UNet. A refit replaces all of them, so
    that nothing of an earlier adapter remains. Refittable engines lack some fusions.
    """

    weights: WeightSource = "copied"

    def check(self) -> None:
        check_installed("Engines by the ONNX parser", "onnx", "onnx", "onnxscript")
        check_tensorrt()

    def build(self, stage: StageExport, timings: Path) -> bytes:
        """Builds the engine of `stage`.

        Raises:
            RuntimeError: see `build_engine`.
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
