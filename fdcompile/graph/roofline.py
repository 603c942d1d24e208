"""Lower bound of the time of a graph on a GPU, from its arithmetic and its memory traffic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fdcompile.graph.flops import FlopInterpreter, Shape

_HEAVY = ("conv", "linear", "addmm", "mm.", "scaled_dot_product")
_VIEWS = ("reshape", "view", "slice", "select", "expand", "permute", "transpose", "squeeze", "split", "chunk", "alias")


@dataclass(frozen=True)
class Card:
    """Peak performance of a GPU in dense half precision, as specified by its vendor.

    Attributes:
        flops: FLOPs per second of the tensor cores.
        bandwidth: memory bandwidth in bytes per second.
    """

    flops: float
    bandwidth: float


CARDS = {
    "h100": Card(989e12, 3.35e12),
    "h200": Card(989e12, 4.8e12),
    "a100": Card(312e12, 2.04e12),
    "l4": Card(121e12, 0.3e12),
    "rtx4090": Card(165e12, 1.01e12),
}


@dataclass(frozen=True)
class Roofline:
    """Minimum cost of a graph in half precision.

    Attributes:
        flops: FLOPs of convolutions, matrix products and attention.
        bytes: bytes that these, normalizations and concatenations read and write; normalizations read their input
            twice.
        operations: number of operations other than views, each a kernel of an eager run.
        seconds: sum of the time of each operation: the longer of its arithmetic and its traffic. Pointwise operations
            take no time, as if they were fused into others.
    """

    flops: int = 0
    bytes: int = 0
    operations: int = 0
    seconds: float = 0.0

    def __add__(self, other: Roofline) -> Roofline:
        return Roofline(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))

    def times(self, count: int) -> Roofline:
        """Cost of `count` runs."""
        return Roofline(count * self.flops, count * self.bytes, count * self.operations, count * self.seconds)


def roofline(graph_module: fx.GraphModule, inputs: Iterable[Shape], card: Card) -> Roofline:
    """Cost of one run of `graph_module` on inputs of these shapes. Nothing is computed."""
    interpreter = _Roof(graph_module, card)
    interpreter.count(inputs)
    return interpreter.total


class _Roof(FlopInterpreter):
    def __init__(self, graph_module: fx.GraphModule, card: Card) -> None:
        super().__init__(graph_module)
        self.total = Roofline()
        self._card = card

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function":
            self.total += self._of(n, self.flops[n], result)
        return result

    def _of(self, node: fx.Node, flops: int, result: Any) -> Roofline:
        name = str(node.target)
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if not outputs or any(view in name for view in _VIEWS):
            return Roofline()
        inputs = [value for source in node.all_input_nodes if isinstance(value := self.env[source], Tensor)]
        norm = "norm" in name
        if not (norm or "cat." in name or any(heavy in name for heavy in _HEAVY)):
            return Roofline(operations=1)
        size = sum(map(_bytes, (*inputs, *outputs, *(inputs[:1] if norm else ()))))
        return Roofline(flops, size, 1, max(flops / self._card.flops, size / self._card.bandwidth))


def _bytes(tensor: Tensor) -> int:
    return int(tensor.numel()) * min(tensor.element_size(), 2)
