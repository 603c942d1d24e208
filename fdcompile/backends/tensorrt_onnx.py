"""Package the stages as TensorRT engines that take other weights: built by TensorRT's own ONNX parser."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
            RuntimeError: the parser does not know an operation, or the builder failed.
        """
        import tensorrt

        logger = tensorrt.Logger(tensorrt.Logger.WARNING)
        builder = tensorrt.Builder(logger)
        network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = tensorrt.OnnxParser(network, logger)
        config = builder.create_builder_config()
        config.set_flag(tensorrt.BuilderFlag.REFIT)
        cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
        config.set_timing_cache(cache, False)
        with tempfile.TemporaryDirectory() as scratch:  # the network reads its weights from there until it is built
            path = Path(scratch) / f"{stage.name}.onnx"
            write_onnx(stage, path)
            if not parser.parse_from_file(str(path)):
                errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
                raise RuntimeError(f"TensorRT's ONNX parser refuses stage '{stage.name}': {errors}")
            config.add_optimization_profile(_profile(builder, network, stage))
            plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RuntimeError(f"TensorRT could not build stage '{stage.name}'; its log says why")
        timings.write_bytes(memoryview(cache.serialize()))
        return bytes(plan)


def _profile(builder: Any, network: Any, stage: StageExport) -> Any:
    """The shapes of those inputs that the network has kept."""
    profile = builder.create_optimization_profile()
    kept = {network.get_input(index).name for index in range(network.num_inputs)}
    for port, shapes in zip(stage.packaged.inputs, stage.shapes, strict=True):
        if port.name in kept:
            profile.set_shape(port.name, *map(tuple, shapes))
    return profile


FORMAT = TensorRTOnnx()
