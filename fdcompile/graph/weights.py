"""Weights of graphs: shared by copies, lifted to inputs, or sliced."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx


@dataclass(frozen=True)
class WeightSlice:
    """Entries `start` to `stop` - 1 along `dim` of the weight at `path`."""

    path: str
    dim: int
    start: int
    stop: int

    def view(self, weight: torch.Tensor) -> torch.Tensor:
        """View of the slice of `weight`."""
        stop = min(self.stop, weight.shape[self.dim])
        return weight.detach().narrow(self.dim, self.start, stop - self.start)

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """Dense copy of the slice of `weight`, channels-last if `weight` is."""
        kept = torch.channels_last if is_channels_last(weight) else torch.contiguous_format
        return self.view(weight).clone(memory_format=kept)


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields `tensor`, or the plain tensors inside of a tensor subclass such as torchao's quantized ones."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor.detach()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Content of `tensor` in row-major order."""
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def is_channels_last(weight: torch.Tensor) -> bool:
    """Whether `weight` is 4-d with the strides of channels-last."""
    return weight.ndim == 4 and weight.stride()[1:] == (1, weight.shape[3] * weight.shape[1], weight.shape[1])


def copy_of(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Copies a graph, with shared weights, flat inputs and a flat tuple of outputs."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    return fx.GraphModule(graph_module, graph)


def lift_weights(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """Copies `graph_module` with its weights as inputs before all others. Returns the copy and the weights."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    weights = graph_module.graph.find_nodes(op="get_attr")
    for node in weights:
        copies[node] = graph.placeholder(node.name)
    for node in graph_module.graph.nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    tensors = [operator.attrgetter(str(node.target))(graph_module) for node in weights]
    return fx.GraphModule({}, graph), tensors
