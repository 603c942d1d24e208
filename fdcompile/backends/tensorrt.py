"""Package the stages as TensorRT engines, and run engines on torch tensors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdcompile.backends.cuda_graphs import CudaGraphs
from fdcompile.backends.protocols import Lowered, WeightSource
from fdcompile.backends.stored import PackagedStage, StageExport, check_installed, device_name

SETTINGS: dict[str, Any] = {
    "require_full_compilation": True,
    "min_block_size": 1,
    "truncate_double": True,
    # A mask that the model passes is a mask, not a triangle.
    "attn_bias_is_causal": False,
    # The engines are built one by one: the UNet need not lie on the GPU meanwhile.
    "offload_module_to_cpu": True,
}
"""How `torch_tensorrt` lowers every stage: whole, and typed as the exported graph is."""


class TensorRT:
    """One engine for each stage, with its weights. All of its operations must convert: nothing falls back to torch."""

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
        for stage in stages:
            progress(f"building stage {stage.name}")
            engine = cache.get(stage, functools.partial(self.build, stage, cache.timings))
            (folder / f"{stage.name}.engine").write_bytes(engine)

    def build(self, stage: StageExport, timings: Path) -> bytes:
        """The engine of `stage`; `timings` is a file for what TensorRT measures of kernels."""
        import torch_tensorrt.dynamo

        engine: bytes = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            stage.program, arg_inputs=profile(stage), timing_cache_path=str(timings), **SETTINGS
        )
        return engine

    def open(
        self,
        folder: Path,
        stages: Mapping[str, PackagedStage],
        weights: Mapping[str, Mapping[str, Tensor]],
        device: torch.device,
    ) -> dict[str, Lowered]:
        import tensorrt

        runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
        engines = {
            name: Engine(runtime, (folder / f"{name}.engine").read_bytes(), [port.name for port in stage.inputs])
            for name, stage in stages.items()
        }
        for name, own in weights.items():
            engines[name].refit(own)
        # They run one after the other, so the intermediates of all fit where those of the largest do.
        scratch = torch.empty(max(engine.scratch for engine in engines.values()), dtype=torch.uint8, device=device)
        for engine in engines.values():
            engine.use(scratch)
        return {name: CudaGraphs(engine, ()) for name, engine in engines.items()}


def check_tensorrt(*packages: str) -> None:
    """Raises ImportError, if TensorRT, one of `packages` or a CUDA device is missing."""
    check_installed("TensorRT engines", "tensorrt", *packages, "tensorrt")
    if not torch.cuda.is_available():
        raise ImportError("TensorRT engines need a CUDA device, and torch finds none here")


def profile(stage: StageExport) -> list[Any]:
    """The shapes that the engine of `stage` is built for, in the order of its inputs."""
    from torch_tensorrt import Input

    inputs = []
    for example, (low, usual, high) in zip(stage.examples, stage.shapes, strict=True):
        if low == high:
            inputs.append(Input(shape=tuple(usual), dtype=example.dtype))
        else:
            shapes = {"min_shape": tuple(low), "opt_shape": tuple(usual), "max_shape": tuple(high)}
            inputs.append(Input(**shapes, dtype=example.dtype))
    return inputs


class Engine:
    """Runs a serialised engine on torch tensors, without copies; results are new tensors.

    Names of inputs and outputs are read from the engine, in its order. An engine runs on a stream of its own, because
    TensorRT synchronises on the default one; while a CUDA graph is recorded it runs on the recorder's.
    """

    def __init__(self, runtime: Any, serialised: bytes, names: Sequence[str]) -> None:
        """Reads an engine that is called with the inputs `names`, in this order."""
        import tensorrt

        self._engine = runtime.deserialize_cuda_engine(serialised)
        if self._engine is None:
            raise RuntimeError("TensorRT could not read an engine: it was built by another version or for another GPU")
        tensors = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in tensors}
        inputs = {name for name in tensors if modes[name] == tensorrt.TensorIOMode.INPUT}
        if unknown := inputs - set(names):
            raise RuntimeError(f"the engine reads {sorted(unknown)}, which its stage does not")
        self._inputs = [name if name in inputs else None for name in names]
        self._outputs = [name for name in tensors if modes[name] == tensorrt.TensorIOMode.OUTPUT]
        types = _types(tensorrt)
        self._dtypes = [types[self._engine.get_tensor_dtype(name)] for name in self._outputs]
        self._context = self._engine.create_execution_context(tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._memory: Tensor | None = None

    @property
    def scratch(self) -> int:
        """Bytes that its intermediates need at most."""
        return int(self._engine.device_memory_size_v2)

    def refit(self, weights: Mapping[str, Tensor]) -> None:
        """Puts `weights` in the place of those with the same names.

        Raises:
            RuntimeError: the engine does not take one of them, or needs more.
        """
        import tensorrt

        refitter = tensorrt.Refitter(self._engine, tensorrt.Logger(tensorrt.Logger.WARNING))
        taken = set(refitter.get_all_weights())
        types = {own: other for other, own in _types(tensorrt).items()}
        held = {name: weight.detach().contiguous() for name, weight in weights.items()}
        refused = sorted(held.keys() - taken)
        for name, weight in held.items():
            if name in taken:
                place = tensorrt.TensorLocation.DEVICE if weight.is_cuda else tensorrt.TensorLocation.HOST
                values = tensorrt.Weights(types[weight.dtype], weight.data_ptr(), weight.numel())
                if not refitter.set_named_weights(name, values, place):
                    refused.append(name)
        if refused:
            raise RuntimeError(f"the engine does not take other weights for {', '.join(refused)}: export again")
        if missing := refitter.get_missing_weights():
            raise RuntimeError(f"the engine also needs {', '.join(missing)} to take other weights: export again")
        if not refitter.refit_cuda_engine():
            raise RuntimeError("TensorRT could not refit an engine; its log says why")

    def use(self, memory: Tensor) -> None:
        """Keeps intermediates in `memory`."""
        self._memory = memory
        self._context.set_device_memory(memory.data_ptr(), memory.numel())

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        device = arguments[0].device
        held = [argument.contiguous() for argument in arguments]
        for name, argument in zip(self._inputs, held, strict=True):
            if name is None:
                continue
            if not self._context.set_input_shape(name, tuple(argument.shape)):
                raise ValueError(f"{name}: shape {tuple(argument.shape)} is outside of the engine's profile")
            self._context.set_tensor_address(name, argument.data_ptr())
        if missing := self._context.infer_shapes():
            raise RuntimeError(f"TensorRT needs more to infer the shapes of {missing}")
        shapes = [tuple(self._context.get_tensor_shape(name)) for name in self._outputs]
        outputs = [torch.empty(s, dtype=d, device=device) for s, d in zip(shapes, self._dtypes, strict=True)]
        for name, output in zip(self._outputs, outputs, strict=True):
            self._context.set_tensor_address(name, output.data_ptr())
        with _own_stream(device) as stream:
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise RuntimeError("TensorRT could not run an engine; its log says why")
        return tuple(outputs)


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Any:
    """A stream that is not the default one, in order with the current one."""
    current = torch.cuda.current_stream(device)
    if torch.cuda.is_current_stream_capturing():
        yield current
        return
    stream = _stream(device)
    stream.wait_stream(current)
    yield stream
    current.wait_stream(stream)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _types(tensorrt: Any) -> dict[Any, torch.dtype]:
    return {
        tensorrt.DataType.FLOAT: torch.float32,
        tensorrt.DataType.HALF: torch.float16,
        tensorrt.DataType.BF16: torch.bfloat16,
        tensorrt.DataType.INT64: torch.int64,
        tensorrt.DataType.INT32: torch.int32,
        tensorrt.DataType.BOOL: torch.bool,
    }


FORMAT = TensorRT()
