"""Compiles stages with inductor."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from fdcompile.backends.cuda_graphs import CudaGraphs, cuda_device
from fdcompile.backends.protocols import Lowered
from fdcompile.graph.weights import lift_weights

_STEPS = 16
"""Smallest upper bound on the steps of a compiled stage; the paper's longest group has 15."""

_GRAPHS = "triton.cudagraphs"


@dataclass(frozen=True)
class InductorBackend:
    """Compiles a stage with ``torch._inductor.standalone_compile`` at its first call for a batch size and a resolution.

    Batch size and resolution are static, because that is faster. The number of steps is dynamic, so that all groups
    share one compilation. Torch's on-disk cache is reused by other processes. On CUDA, calls are replayed as CUDA
    graphs.

    Attributes:
        mode: a mode of ``torch.compile``, such as ``"max-autotune"``. Its setting for CUDA graphs is ignored.
        cuda_graphs: whether calls are replayed as CUDA graphs on CUDA.
        options: settings of ``torch._inductor.config`` by name, such as ``{"coordinate_descent_tuning": True}``.

    Raises:
        ValueError: torch has no such mode or setting, or `options` sets CUDA graphs.
    """

    mode: str = "default"
    cuda_graphs: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    name: str = field(default="inductor", init=False)

    def __post_init__(self) -> None:
        modes = torch._inductor.list_mode_options()
        if self.mode not in modes:
            raise ValueError(f"mode={self.mode!r}: expected one of {', '.join(modes)}")
        known = torch._inductor.list_options()
        if unknown := [name for name in self.options if name.replace("-", "_") not in known]:
            raise ValueError(f"options: torch._inductor.config has no {unknown[0]!r}")
        if _GRAPHS in self.options:
            raise ValueError(f"options: {_GRAPHS!r}: set cuda_graphs={bool(self.options[_GRAPHS])}")

    def lower(self, graph_module: fx.GraphModule, name: str) -> Lowered:
        settings = torch._inductor.list_mode_options()[self.mode] | dict(self.options) | {_GRAPHS: False}
        return _CompiledStage(graph_module, settings, self.cuda_graphs)


class _CompiledStage:
    def __init__(self, graph_module: fx.GraphModule, settings: dict[str, Any], cuda_graphs: bool) -> None:
        self._graph, self._weights = lift_weights(graph_module)
        self._settings = settings
        self._cuda_graphs = cuda_graphs
        inputs = self._graph.graph.find_nodes(op="placeholder")[len(self._weights) :]
        self._stepwise = [node.meta.get("stepwise", False) for node in inputs]
        self._compiled: dict[tuple[Any, ...], tuple[int, Lowered]] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Reasons why calls are not replayed as CUDA graphs; empty if all are."""
        notes = [getattr(compiled, "notes", ()) for _, compiled in self._compiled.values()]
        return tuple(dict.fromkeys(itertools.chain.from_iterable(notes)))

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        arguments = with_scalars(arguments, self._weights)
        arguments = tuple(tensor.contiguous() if 0 in tensor.stride() else tensor for tensor in arguments)
        pairs = list(zip(arguments, self._stepwise, strict=True))
        weights = tuple((weight.stride(), weight.dtype) for weight in self._weights)
        key = (weights, *((tensor.shape[stepwise:], tensor.stride(), tensor.dtype) for tensor, stepwise in pairs))
        steps = next((len(tensor) for tensor, stepwise in pairs if stepwise), 1)
        most, compiled = self._compiled.get(key, (0, None))
        if compiled is None or steps > most:
            most = max(steps, _STEPS)
            compiled = self._compile(arguments, most)
            self._compiled[key] = most, compiled
        return compiled(*arguments)

    def _compile(self, arguments: Sequence[Tensor], most: int) -> Lowered:
        """Compiles for up to `most` steps: assumptions of inductor on their sizes also hold for fewer steps."""
        environment = ShapeEnv()
        source = ConstantSource("steps")
        symbol = environment.create_symbol(most, source, DimDynamic.DYNAMIC)
        steps: Any = environment.create_symintnode(symbol, hint=most, source=source)
        fake_mode = FakeTensorMode(shape_env=environment)
        with fake_mode:
            inputs = [
                torch.empty_strided(
                    (steps, *tensor.shape[1:]) if stepwise else tensor.shape,
                    tensor.stride(),
                    dtype=tensor.dtype,
                    device=tensor.device,
                )
                for tensor, stepwise in zip(arguments, self._stepwise, strict=True)
            ]
        weights = [fake_mode.from_tensor(weight.detach(), static_shapes=True) for weight in self._weights]
        placeholders = self._graph.graph.find_nodes(op="placeholder")
        for node, fake in zip(placeholders, [*weights, *inputs], strict=True):
            node.meta["val"] = fake
        with torch.no_grad(), torch._inductor.config.patch(self._settings):
            artifact = torch._inductor.standalone_compile(self._graph, [*weights, *inputs])

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return tuple(artifact(*self._weights, *tensors))

        device, *others = {tensor.device for tensor in (*arguments, *self._weights)}
        if not self._cuda_graphs or device.type != "cuda" or others:
            return run
        return CudaGraphs(run, self._weights, cuda_device(device))


def with_scalars(arguments: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Moves scalar tensors in `arguments` from the CPU to the device of the other arguments or of `weights`.

    Compiled code would read CPU scalars into launch arguments, which a CUDA graph keeps as recorded.
    """
    if all(tensor.ndim for tensor in arguments):
        return tuple(arguments)
    devices = (tensor.device for tensor in (*arguments, *weights) if tensor.device.type != "cpu")
    device = next(devices, torch.device("cpu"))
    return tuple(tensor if tensor.ndim else tensor.to(device, non_blocking=True) for tensor in arguments)
