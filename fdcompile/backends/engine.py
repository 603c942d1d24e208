"""Run TensorRT's engines on torch tensors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fdcompile.backends.engine_log import errors_of, log_of
from fdcompile.backends.stored import StageWeights


class Engine:
    """Runs a serialized engine on torch tensors without copies, and returns new tensors.

    The engine runs on a side stream, because TensorRT synchronizes on the default stream; while a CUDA graph is
    recorded it runs on the recording stream.
    """

    def __init__(
        self,
        trt: Any,
        serialized: bytes,
        names: Sequence[str],
        create_context: Callable[[Any], Any] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> None:
        """Deserializes an engine.

        Args:
            trt: the module ``tensorrt`` or ``tensorrt_rtx``.
            serialized: the engine.
            names: names of the arguments, in order; those that the engine does not have are not passed to it.
            create_context: makes an execution context without memory once the engine has its weights; None uses
                TensorRT's default settings.
            outputs: names of the outputs, in order; None uses the order of the engine.

        Raises:
            RuntimeError: the engine cannot be read on this machine, or has other inputs or outputs.
        """
        self._trt = trt
        self._runtime = trt.Runtime(log_of(trt))
        with errors_of(trt) as errors:
            self._engine = self._runtime.deserialize_cuda_engine(serialized)
        if self._engine is None:
            why = "; ".join(errors) or "it was built by another version or for another GPU"
            raise RuntimeError(f"{trt.__name__} could not read an engine: {why}")
        tensors = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in tensors}
        inputs = {name for name in tensors if modes[name] == trt.TensorIOMode.INPUT}
        if unknown := inputs - set(names):
            raise RuntimeError(f"the engine reads {sorted(unknown)}, which its stage does not read")
        self._inputs = [name if name in inputs else None for name in names]
        made = [name for name in tensors if modes[name] == trt.TensorIOMode.OUTPUT]
        self._outputs = made if outputs is None else list(outputs)
        if set(self._outputs) != set(made):
            raise RuntimeError(f"the engine returns {sorted(made)}, its stage {sorted(self._outputs)}")
        types = torch_types(trt)
        self._dtypes = [types[self._engine.get_tensor_dtype(name)] for name in self._outputs]
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._create_context = create_context or (lambda engine: engine.create_execution_context(strategy))
        self._context: Any = None
        self._memory: Tensor | None = None

    @property
    def scratch(self) -> int:
        """Bytes of memory that the intermediates need."""
        return int(self._engine.device_memory_size_v2)

    def refit(self, weights: Mapping[str, Tensor]) -> None:
        """Replaces weights of the engine by `weights`, by name.

        Raises:
            RuntimeError: the engine rejects one of them, or requires others.
        """
        trt = self._trt
        refitter = trt.Refitter(self._engine, log_of(trt))
        taken = set(refitter.get_all_weights())
        types = {theirs: ours for ours, theirs in torch_types(trt).items()}
        held = {name: weight.detach().contiguous() for name, weight in weights.items()}
        refused = sorted(held.keys() - taken)
        for name, weight in held.items():
            if name in taken:
                place = trt.TensorLocation.DEVICE if weight.is_cuda else trt.TensorLocation.HOST
                values = trt.Weights(types[weight.dtype], weight.data_ptr(), weight.numel())
                if not refitter.set_named_weights(name, values, place):
                    refused.append(name)
        if refused:
            raise RuntimeError(f"the engine cannot be refitted with {', '.join(refused)}: export again")
        if missing := refitter.get_missing_weights():
            raise RuntimeError(f"the engine needs {', '.join(missing)} as well to be refitted: export again")
        if not refitter.refit_cuda_engine():
            raise RuntimeError("TensorRT could not refit an engine: see its log")

    def use(self, memory: Tensor) -> None:
        """Creates the execution context, with intermediates in `memory`."""
        self._context = self._create_context(self._engine)
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
        with _side_stream(device) as stream:
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise RuntimeError("TensorRT could not run an engine: see its log")
        return tuple(outputs)


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Any:
    """Runs the block on a stream other than the default, synchronized with the current one."""
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


def torch_types(trt: Any) -> dict[Any, torch.dtype]:
    """Maps TensorRT's data types to torch's."""
    return {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT64: torch.int64,
        trt.DataType.INT32: torch.int32,
        trt.DataType.BOOL: torch.bool,
    }


def prepare_engines(engines: Mapping[str, Engine], weights: StageWeights, device: torch.device) -> None:
    """Refits `engines` with `weights`, and shares the memory of intermediates, since they run one after the other."""
    for name, tensors in weights.items():
        engines[name].refit(tensors)
    scratch = torch.empty(max(engine.scratch for engine in engines.values()), dtype=torch.uint8, device=device)
    for engine in engines.values():
        engine.use(scratch)
