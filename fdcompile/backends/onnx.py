"""Packages stages as ONNX graphs, for onnxruntime and for TensorRT's parser."""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from fdcompile.backends.protocols import Lowered, PackageFormat, WeightSource
from fdcompile.backends.stored import PackagedStage, StageExport, StageWeights, check_installed
from fdcompile.errors import warn_user

OPSET = 23
"""The first opset with GroupNormalization on any type and with Attention."""


class Onnx(PackageFormat):
    """One graph for each stage, its weights in a separate file, and a file of options for ``trtexec``."""

    weights: WeightSource = "held"

    def check(self) -> None:
        check_installed("ONNX packages", "onnx", "onnx", "onnxscript", "onnxruntime")

    def made_with(self, device: torch.device) -> dict[str, str]:
        return {"opset": str(OPSET)}

    def write(self, stages: Sequence[StageExport], folder: Path, progress: Callable[[str], None]) -> None:
        for stage in stages:
            progress(f"writing stage {stage.name}")
            write_onnx(stage, folder / f"{stage.name}.onnx")
            (folder / f"{stage.name}.trtexec.txt").write_text(_trtexec(stage), encoding="utf-8")

    def open(
        self, folder: Path, stages: Mapping[str, PackagedStage], weights: StageWeights, device: torch.device
    ) -> dict[str, Lowered]:
        return {name: Session(folder / f"{name}.onnx", stage, device) for name, stage in stages.items()}


def write_onnx(stage: StageExport, path: Path) -> None:
    """Writes the graph of `stage` to `path`, and its weights, named as in the UNet, to a file next to it.

    The weights are inputs of the graph while the ONNX optimizer runs, since it would otherwise merge and rename them.
    """
    from onnxscript.optimizer import optimize_ir

    with torch.no_grad(), _quiet_exporter():
        program: Any = torch.onnx.export(
            _cast_joined(stage.program),
            args=stage.examples,
            dynamo=True,
            opset_version=OPSET,
            input_names=[port.name for port in stage.packaged.inputs],
            output_names=[port.name for port in stage.packaged.outputs],
            optimize=False,
            verbose=False,
        )
    graph = program.model.graph
    weights = {name: graph.initializers.pop(name) for name in [weight.name for weight in stage.packaged.weights]}
    tensors = {name: weight.const_value for name, weight in weights.items()}
    for weight in weights.values():
        weight.const_value = None
        graph.inputs.append(weight)
    optimize_ir(program.model)
    del graph.inputs[len(graph.inputs) - len(weights) :]
    for name, weight in weights.items():
        weight.const_value = tensors[name]
        graph.register_initializer(weight)
    program.save(str(path), external_data=True)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Suppresses messages of torch's exporter on torchvision and on its own deprecated calls."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _cast_joined(program: ExportedProgram) -> ExportedProgram:
    """Adds casts to tensors that `program` concatenates with tensors of another type, as SDXL's texts with its sizes.

    Torch promotes the types in a list of tensors. ONNX requires equal types, and the exporter does not cast all.
    """
    cast_program = copy.copy(program)
    cast_program._graph_module = graph_module = copy.deepcopy(program.graph_module)
    for node in list(graph_module.graph.nodes):
        joined = _joined(node)
        promoted = node.meta["val"].dtype if joined else None
        for tensor in joined:
            if tensor.meta["val"].dtype == promoted:
                continue
            with graph_module.graph.inserting_before(node):
                cast = graph_module.graph.call_function(torch.ops.aten._to_copy.default, (tensor,), {"dtype": promoted})
            cast.meta = {**tensor.meta, "val": tensor.meta["val"].to(promoted)}
            node.replace_input_with(tensor, cast)
    graph_module.recompile()
    return cast_program


def _joined(node: fx.Node) -> list[fx.Node]:
    """Tensors that `node` combines to one, if it has an argument of type ``List[Tensor]``."""
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(node.meta.get("val"), Tensor):
        return []
    lists: list[Any] = [
        value
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False)
        if str(argument.type) == "List[Tensor]"
    ]
    return list(dict.fromkeys(lists[0])) if lists else []


class Session:
    """Runs an ONNX graph with onnxruntime, on the memory of torch tensors if it supports their device.

    For CUDA tensors the plug-in of TensorRT for RTX is used if it is installed, on copies of the tensors.
    """

    def __init__(self, path: Path, stage: PackagedStage, device: torch.device) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        providers: list[str] | None = ["CPUExecutionProvider"]
        if device.type == "cuda" and (rtx := _rtx_devices()):
            options.add_provider_for_devices(rtx, {})
            providers, device = None, torch.device("cpu")
        elif device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        elif device.type != "cpu":
            warn_user(
                f"onnxruntime has nothing that runs on {device.type} here, so the CPU runs stage '{path.stem}': "
                f"pip install onnxruntime-gpu, or onnxruntime-ep-nv-tensorrt-rtx for an RTX GPU"
            )
            device = torch.device("cpu")
        self._device = device
        self._session = onnxruntime.InferenceSession(str(path), options, providers)
        taken = {value.name for value in self._session.get_inputs()}
        self._inputs = [port.name if port.name in taken else None for port in stage.inputs]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        from onnxruntime import OrtValue

        binding = self._session.io_binding()
        for name, argument in zip(self._inputs, arguments, strict=True):
            if name is not None:
                binding.bind_ortvalue_input(name, OrtValue.from_dlpack(argument.to(self._device).contiguous()))
        for name in self._outputs:
            binding.bind_output(name, self._device.type, self._device.index or 0)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # onnxruntime uses its own stream
        self._session.run_with_iobinding(binding)
        outputs = map(torch.utils.dlpack.from_dlpack, binding.get_outputs())
        return tuple(output.to(arguments[0].device) for output in outputs)


@functools.cache
def _rtx_devices() -> list[Any]:
    """Devices of onnxruntime's plug-in of TensorRT for RTX; empty if it is not installed."""
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as plugin
    except ImportError:
        return []
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    name = plugin.get_ep_name()
    try:
        onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
    except Fail as error:
        warn_user(f"onnxruntime's plug-in of TensorRT for RTX cannot be used here: {error}")
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]


def in_float32(path: Path) -> Path:
    """Converts bfloat16 in the graph at `path` to float32, since onnxruntime does not run bfloat16 on a CPU.

    Returns:
        The path of the new graph, in the same folder.
    """
    import onnx

    model = onnx.load(str(path))
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t] if attribute.HasField("t") else []
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.BFLOAT16:
                attribute.i = onnx.TensorProto.FLOAT
    for value in values:
        if value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for tensor in tensors:
        if tensor.data_type == onnx.TensorProto.BFLOAT16:
            numbers = onnx.numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(onnx.numpy_helper.from_array(numbers, tensor.name))
    written = path.with_name(f"{path.stem}.float32.onnx")
    onnx.save(model, str(written), save_as_external_data=True)
    return written


def _trtexec(stage: StageExport) -> str:
    """Options of ``trtexec`` that build `stage` for the shapes of its package."""
    names = [port.name for port in stage.packaged.inputs]
    options = [f"--onnx={stage.name}.onnx"]
    for kind, which in (("min", 0), ("opt", 1), ("max", 2)):
        shapes = [
            f"{name}:{'x'.join(map(str, sizes[which]))}"
            for name, sizes in zip(names, stage.shapes, strict=True)
            if sizes[0]
        ]
        options.append(f"--{kind}Shapes={','.join(shapes)}")
    return "\n".join([*options, "--stronglyTyped", f"--saveEngine={stage.name}.engine"]) + "\n"


FORMAT = Onnx()
