"""A graph as a file, so that a pass can be run alone on it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._graph_pickler import GraphPickler, Options
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fdcompile.graph.weights import copy_of

_READ = ("val", "binding_time", "fresh", "nn_module_stack")
"""The metadata that passes read."""

_STACK = "module_stack"
"""Where a stored graph has its ``nn_module_stack``, which the pickler leaves out."""


def save_graph(graph_module: fx.GraphModule, path: Path) -> None:
    """Writes a captured graph with its labels and metadata; of its weights only type, shape and device."""
    stored = copy_of(graph_module)
    for node in stored.graph.nodes:
        node.meta = {name: node.meta[name] for name in _READ if name in node.meta}
        if stack := node.meta.pop("nn_module_stack", None):
            node.meta[_STACK] = dict(stack)
        if node.op == "get_attr":
            _empty_weight(stored, str(node.target))
    path.write_bytes(GraphPickler.dumps(stored, Options(ops_filter=None)))


def load_graph(path: str | Path) -> fx.GraphModule:
    """The graph that `save_graph` wrote. It is unpickled, which can run any code: load only files of your own."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    graph_module = GraphPickler.loads(Path(path).read_bytes(), mode)
    assert isinstance(graph_module, fx.GraphModule)
    for node in graph_module.graph.nodes:
        if stack := node.meta.pop(_STACK, None):
            node.meta["nn_module_stack"] = stack
    return graph_module


def _empty_weight(graph_module: fx.GraphModule, path: str) -> None:
    """Puts zeros that take no room in the place of the weight at `path`."""
    owner_path, _, name = path.rpartition(".")
    owner = graph_module.get_submodule(owner_path)
    weight: Tensor = getattr(owner, name)
    zeros = torch.zeros((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
    setattr(owner, name, nn.Parameter(zeros, requires_grad=False) if isinstance(weight, nn.Parameter) else zeros)
