"""A stand-in for the `tensorrt` module whose engines are ONNX graphs that onnxruntime runs on a CPU.

It has the part of TensorRT's interface that fdcompile uses to parse, build, read, refit and run engines, and holds its
callers to what TensorRT holds them to: names, shapes within the profile, memory by address.
"""

from __future__ import annotations

import ctypes
import enum
import io
import json
import math
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

built: list[str] = []
"""Names of the graphs that were built since it was last cleared."""

dropped: set[str] = set()
"""Weights that engines built from now on do not take others for."""


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT64 INT32 BOOL")
TensorLocation = enum.Enum("TensorLocation", "HOST DEVICE")
ExecutionContextAllocationStrategy = enum.Enum("ExecutionContextAllocationStrategy", "USER_MANAGED")
NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")
BuilderFlag = enum.Enum("BuilderFlag", "REFIT REFIT_INDIVIDUAL STRIP_PLAN")

LayerType = enum.Enum("LayerType", "ATTENTION_INPUT")
CudaGraphStrategy = enum.Enum("CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE")
DynamicShapesKernelSpecializationStrategy = enum.Enum("DynamicShapesKernelSpecializationStrategy", "EAGER")

_TYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(float16)": (DataType.HALF, np.float16),
    "tensor(int64)": (DataType.INT64, np.int64),
}
_ONNX_TYPES = {1: DataType.FLOAT, 7: DataType.INT64, 10: DataType.HALF}


class Logger:
    ERROR = 1
    WARNING = 2


class ILogger: ...


class IProgressMonitor: ...


class Weights:
    def __init__(self, dtype: DataType, address: int, count: int) -> None:
        numbers = np.dtype({DataType.FLOAT: np.float32, DataType.HALF: np.float16}[dtype])
        memory = (ctypes.c_char * (count * numbers.itemsize)).from_address(address)
        self.values = np.frombuffer(memory, numbers).copy()


class Network:
    def __init__(self, flags: int) -> None:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        self.path = Path()
        self.model: Any = None
        self.marked: set[str] = set()

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    @property
    def num_outputs(self) -> int:
        return len(self.model.graph.output)

    num_layers = 0

    def mark_weights_refittable(self, name: str) -> bool:
        self.marked |= {weight.name for weight in self.model.graph.initializer if weight.name == name}
        return name in self.marked

    def get_input(self, index: int) -> Any:
        return _tensor(self.model.graph.input[index])

    def get_output(self, index: int) -> Any:
        return _tensor(self.model.graph.output[index])


def _tensor(value: Any) -> SimpleNamespace:
    return SimpleNamespace(name=value.name, dtype=_ONNX_TYPES[value.type.tensor_type.elem_type])


class OnnxParser:
    def __init__(self, network: Network, logger: ILogger) -> None:
        self._network = network

    def parse_from_file(self, path: str) -> bool:
        self._network.path = Path(path)
        self._network.model = onnx.load(path, load_external_data=False)
        return True


class Profile(dict[str, Any]):
    def set_shape(self, name: str, low: Any, usual: Any, high: Any) -> None:
        assert all(least <= size <= most for least, size, most in zip(low, usual, high, strict=True))
        self[name] = [low, usual, high]


class TimingCache:
    def __init__(self, earlier: bytes) -> None:
        self._earlier = earlier

    def serialize(self) -> bytes:
        return self._earlier + b"t"


class BuilderConfig:
    def __init__(self) -> None:
        self.flags: set[BuilderFlag] = set()
        self.profile = Profile()

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profile = profile
        return 0

    def create_timing_cache(self, earlier: bytes) -> TimingCache:
        return TimingCache(earlier)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        return not ignore_mismatch


class Builder:
    def __init__(self, logger: ILogger) -> None: ...

    def create_network(self, flags: int) -> Network:
        return Network(flags)

    def create_builder_config(self) -> BuilderConfig:
        return BuilderConfig()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: BuilderConfig) -> bytes:
        """An archive of the graph with its weights, and of the profile."""
        built.append(network.path.stem)
        assert {value.name for value in network.model.graph.input} == config.profile.keys()
        model = onnx.load(str(network.path))
        refittable = [weight.name for weight in model.graph.initializer if weight.name not in dropped]
        if BuilderFlag.REFIT not in config.flags:
            refittable = [name for name in refittable if name in network.marked]
        about = {"profile": config.profile, "refit": refittable}
        if BuilderFlag.STRIP_PLAN in config.flags:
            for weight in model.graph.initializer:
                values = onnx.numpy_helper.to_array(weight)
                if weight.name in refittable:
                    weight.CopyFrom(onnx.numpy_helper.from_array(np.full_like(values, np.nan), weight.name))
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr("graph", model.SerializeToString())
            archive.writestr("about", json.dumps(about))
        return data.getvalue()


class Runtime:
    engine_header_size = 64

    def __init__(self, logger: ILogger) -> None: ...

    def deserialize_cuda_engine(self, plan: bytes) -> Engine:
        with zipfile.ZipFile(io.BytesIO(plan)) as archive:
            return Engine(onnx.load_from_string(archive.read("graph")), json.loads(archive.read("about")))


class Engine:
    device_memory_size_v2 = 64

    def __init__(self, model: Any, about: dict[str, Any]) -> None:
        self.model = model
        self.profile, self.refittable = about["profile"], about["refit"]
        self.load()

    def load(self) -> None:
        self.session = onnxruntime.InferenceSession(self.model.SerializeToString(), providers=["CPUExecutionProvider"])
        self.modes = dict.fromkeys((value.name for value in self.session.get_inputs()), TensorIOMode.INPUT)
        self.modes |= dict.fromkeys((value.name for value in self.session.get_outputs()), TensorIOMode.OUTPUT)
        self.types = {value.name: value.type for value in (*self.session.get_inputs(), *self.session.get_outputs())}

    @property
    def num_io_tensors(self) -> int:
        return len(self.modes)

    def get_tensor_name(self, index: int) -> str:
        return list(self.modes)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.modes[name]

    def get_tensor_dtype(self, name: str) -> DataType:
        return _TYPES[self.types[name]][0]

    def create_execution_context(self, settings: ExecutionContextAllocationStrategy | RuntimeConfig) -> Context:
        return Context(self)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()


class RuntimeConfig:
    """As TensorRT for RTX has it, with what it compiles on a GPU."""

    def create_runtime_cache(self) -> RuntimeConfig:
        return self

    def serialize(self) -> bytes:
        return b"kernels"

    def deserialize(self, content: bytes) -> bool:
        return content == b"kernels"

    def set_runtime_cache(self, cache: RuntimeConfig) -> None: ...

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None: ...


class Context:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._outputs: dict[str, Any] = {}

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self._engine.device_memory_size_v2

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.profile[name]
        self._shapes[name] = shape
        return all(least <= size <= most for least, size, most in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def infer_shapes(self) -> list[str]:
        """Runs the graph, for want of another way; what it reads has its address by now."""
        given = {name: self._array(name, shape) for name, shape in self._shapes.items()}
        names = [output.name for output in self._engine.session.get_outputs()]
        self._outputs = dict(zip(names, self._engine.session.run(names, given), strict=True))
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape: tuple[int, ...] = self._outputs[name].shape
        return shape

    def execute_async_v3(self, stream: int) -> bool:
        assert stream != 0
        for name, values in self._outputs.items():
            self._array(name, values.shape)[...] = values
        return True

    def _array(self, name: str, shape: tuple[int, ...]) -> Any:
        dtype = np.dtype(_TYPES[self._engine.types[name]][1])
        memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(self._addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)


class Refitter:
    def __init__(self, engine: Engine, logger: ILogger) -> None:
        self._engine = engine
        self._given: dict[str, Any] = {}

    def get_all_weights(self) -> list[str]:
        return list(self._engine.refittable)

    def set_named_weights(self, name: str, weights: Weights, place: TensorLocation) -> bool:
        assert place is TensorLocation.HOST
        self._given[name] = weights.values
        old = next(weight for weight in self._engine.model.graph.initializer if weight.name == name)
        return weights.values.size == math.prod(old.dims)

    def get_missing_weights(self) -> list[str]:
        return []

    def refit_cuda_engine(self) -> bool:
        for old in self._engine.model.graph.initializer:
            if old.name in self._given:
                old.CopyFrom(onnx.numpy_helper.from_array(self._given[old.name].reshape(tuple(old.dims)), old.name))
        self._engine.load()
        return True


def module(name: str = "tensorrt") -> ModuleType:
    """To be put into ``sys.modules`` as `name`: TensorRT, or ``"tensorrt_rtx"``."""
    made = ModuleType(name)
    vars(made).update({name: value for name, value in globals().items() if not name.startswith("_")})
    made.__version__ = "11.0.stand-in"  # type: ignore[attr-defined]
    return made
