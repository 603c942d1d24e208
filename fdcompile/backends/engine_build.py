"""Builds engines with the ONNX parser of TensorRT or of TensorRT for RTX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fdcompile.backends.engine import torch_types
from fdcompile.backends.engine_log import errors_of, held_interrupts, log_of
from fdcompile.backends.stored import StageExport


def build_engine(trt: Any, stage: StageExport, path: Path, configure: Callable[[Any, Any], None]) -> bytes:
    """Builds the engine of `stage` from its ONNX graph.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        stage: the stage.
        path: file of the ONNX graph.
        configure: called with the network and the builder's configuration to change their settings.

    Returns:
        The serialized engine.

    Raises:
        RuntimeError: the parser rejects an operation or makes a network with other inputs or outputs, or the builder
            fails.
    """
    builder = trt.Builder(log_of(trt))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log_of(trt))
    with errors_of(trt) as errors, held_interrupts() as interrupts:
        parsed = parser.parse_from_file(str(path))
        plan = None
        if parsed:
            _check_network(trt, network, stage)
            _let_attention_decompose(trt, network)
            config = builder.create_builder_config()
            configure(network, config)
            config.progress_monitor = _monitor(trt, interrupts)
            if config.add_optimization_profile(_profile(builder, network, stage)) < 0:
                raise RuntimeError(f"{trt.__name__} refuses the shapes of stage '{stage.name}': {'; '.join(errors)}")
            plan = builder.build_serialized_network(network, config)
    if not parsed:
        refused = "; ".join(_spell_error(parser.get_error(index)) for index in range(parser.num_errors))
        raise RuntimeError(f"{trt.__name__}'s ONNX parser refuses stage '{stage.name}': {refused}")
    if plan is None:
        raise RuntimeError(f"{trt.__name__} could not build stage '{stage.name}': {'; '.join(errors)}")
    return bytes(plan)


def _check_network(trt: Any, network: Any, stage: StageExport) -> None:
    """Checks names and types of inputs and outputs against `stage`; unused inputs may be missing."""
    types = torch_types(trt)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    read, made = ({tensor.name: types[tensor.dtype] for tensor in tensors} for tensors in (inputs, outputs))
    expected = {port.name: port.dtype for port in stage.packaged.inputs}
    if not read.items() <= expected.items():
        raise RuntimeError(f"stage '{stage.name}': the parsed network reads {read}, expected {expected}")
    if list(made.items()) != [(port.name, port.dtype) for port in stage.packaged.outputs]:
        raise RuntimeError(f"stage '{stage.name}': the parsed network returns {made}")


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Allows the builder to decompose attention where it has no kernel for it, such as in float32."""
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the base class has no attribute `attention`
            layer.attention.decomposable = True


def _profile(builder: Any, network: Any, stage: StageExport) -> Any:
    """Optimization profile of the inputs that the network has kept."""
    profile = builder.create_optimization_profile()
    kept = {network.get_input(index).name for index in range(network.num_inputs)}
    for port, shapes in zip(stage.packaged.inputs, stage.shapes, strict=True):
        if port.name in kept:
            profile.set_shape(port.name, *map(tuple, shapes))
    return profile


def _monitor(trt: Any, interrupts: list[int]) -> Any:
    """Returns a progress monitor that stops a build after the current step if there are `interrupts`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None: ...

        def step_complete(self, phase: str, step: int) -> bool:
            return not interrupts

        def phase_finish(self, phase: str) -> None: ...

    return Monitor()


def _spell_error(error: Any) -> str:
    return f"{error.node_operator()} (node {error.node_name()}): {error.desc()}"
