"""Stores graphs in files, so that a pass can be run on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._graph_pickler import GraphPickler, Options
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from fdcompile.graph.flops import Shape
from fdcompile.graph.weights import copy_of

_LABELS = ("binding_time", "recomputed")


def save_graph(graph_module: fx.GraphModule, path: Path) -> None:
    """Writes a captured graph with the metadata that passes read. Contents of tensors are not stored."""
    stored = copy_of(graph_module)
    for node in stored.graph.nodes:
        meta = {name: node.meta[name] for name in _LABELS if name in node.meta}
        if "val" in node.meta:
            meta["described"] = pytree.tree_map_only(Tensor, Shape.of, node.meta["val"])
        meta["modules"] = dict(node.meta.get("nn_module_stack") or {})
        node.meta = meta
        if node.op == "get_attr":
            _empty_weight(stored, str(node.target))
    path.write_bytes(GraphPickler.dumps(stored, Options(ops_filter=None)))


def load_graph(path: str | Path) -> fx.GraphModule:
    """Reads a graph written by `save_graph`. It is unpickled, which can execute code: load only trusted files."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    graph_module = GraphPickler.loads(Path(path).read_bytes(), mode)
    assert isinstance(graph_module, fx.GraphModule)
    with mode:
        for node in graph_module.graph.nodes:
            if "described" in node.meta:
                described = node.meta.pop("described")
                node.meta["val"] = pytree.tree_map(_tensor, described, is_leaf=lambda leaf: isinstance(leaf, Shape))
            node.meta["nn_module_stack"] = node.meta.pop("modules")
    return graph_module


def _tensor(value: Any) -> Any:
    return value.empty() if isinstance(value, Shape) else value


def _empty_weight(graph_module: fx.GraphModule, path: str) -> None:
    """Replaces the weight at `path` by expanded zeros, which take no memory."""
    owner_path, _, name = path.rpartition(".")
    owner = graph_module.get_submodule(owner_path)
    weight: Tensor = getattr(owner, name)
    zeros = torch.zeros((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
    setattr(owner, name, nn.Parameter(zeros, requires_grad=False) if isinstance(weight, nn.Parameter) else zeros)
