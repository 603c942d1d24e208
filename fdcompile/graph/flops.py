"""Counts floating point operations, including attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


class Shape(NamedTuple):
    """Size, type and device of a tensor."""

    size: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Shape:
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def empty(self) -> Tensor:
        return torch.empty(self.size, dtype=self.dtype, device=self.device)


def concrete_shape(tensor: Tensor, symbol: int) -> Shape:
    """Shape of `tensor` with every symbol in its size replaced by the number `symbol`."""
    return Shape.of(tensor)._replace(size=torch.Size(concrete_size(size, symbol) for size in tensor.shape))


def concrete_size(size: int | torch.SymInt, symbol: int) -> int:
    if isinstance(size, int):
        return size
    return int(size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, symbol)))


def shapes(tensors: Iterable[Tensor]) -> tuple[Shape, ...]:
    return tuple(map(Shape.of, tensors))


def flop_counter() -> FlopCounterMode:
    """Returns a `FlopCounterMode` that includes flash attention on the CPU, which torch does not count.

    It counts convolutions, matrix products and attention, with two operations for a multiply-add.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={flash: _attention_flops})


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(tuple(query), tuple(key), tuple(value)))  # type: ignore[no-untyped-call]


def count_flops(graph_module: fx.GraphModule, inputs: Iterable[Shape]) -> int:
    """FLOPs of one run of `graph_module` on inputs of these shapes. Nothing is computed."""
    return sum(FlopInterpreter(graph_module).count(inputs).values())


class FlopInterpreter(fx.Interpreter):
    """Counts the FLOPs of each operation in a run.

    They do not depend on types, so all floating-point values are float32: the graph may have been captured under
    autocast. Weights have the shapes with which they were captured, because the UNet's may have changed since.

    Attributes:
        flops: FLOPs of the nodes that have run.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.flops: dict[fx.Node, int] = {}
        self._counter = flop_counter()

    def count(self, inputs: Iterable[Shape]) -> dict[fx.Node, int]:
        """FLOPs of each operation in one run on inputs of these shapes. Nothing is computed."""
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), self._counter:
            self.run(*(shape.empty() for shape in inputs))
        return self.flops

    def run_node(self, n: fx.Node) -> Any:
        before = self._counter.get_total_flops()
        result = self._run(n)
        self.flops[n] = self._counter.get_total_flops() - before
        return pytree.tree_map_only(Tensor, _as_float32, result)

    def _run(self, node: fx.Node) -> Any:
        if node.target is torch.ops.aten._assert_tensor_metadata.default:  # it compares types
            return None
        if node.op == "get_attr" and isinstance(weight := node.meta.get("val"), Tensor):
            return Shape.of(weight).empty()
        return super().run_node(node)


def _as_float32(tensor: Tensor) -> Tensor:
    """Converts the types that autocast mixes; float8, which has operations of its own, remains."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16, torch.float64) else tensor
