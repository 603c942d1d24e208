"""A graph as text."""

from __future__ import annotations

import torch
from torch import fx

from fdcompile.graph.text import graph_text

aten = torch.ops.aten


def graph_module() -> fx.GraphModule:
    root = torch.nn.Module()
    root.unet = torch.nn.Module()
    root.unet.mid = torch.nn.Linear(2, 2)
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("unet.mid.weight")
    inside = graph.call_function(aten.linear.default, (x, weight))
    outside = graph.call_function(aten.linear.default, (inside, weight))
    pair = graph.call_function(aten.max.dim, (outside, 0), {"keepdim": True})
    inside.meta["nn_module_stack"] = {"": ("unet", "UNet"), "mid": ("unet.mid", "Linear")}
    for node in (x, weight, inside, outside):
        node.meta["val"] = torch.empty(2, 2)
    pair.meta["val"] = (torch.empty(1, 2), torch.empty(1, 2, dtype=torch.int64))
    graph.output((outside, pair))
    return fx.GraphModule(root, graph)


def test_weights_stand_where_they_are_read_under_the_path_in_the_reading_module() -> None:
    assert graph_text(graph_module()).splitlines() == [
        "%x : input  # float32[2, 2]",
        "%linear_default : linear(%x, weight)  # float32[2, 2] in mid",
        "%linear_default_1 : linear(%linear_default, mid.weight)  # float32[2, 2]",
        "%max_dim : max.dim(%linear_default_1, 0, keepdim=True)  # float32[1, 2], int64[1, 2]",
        "return (%linear_default_1, %max_dim)",
    ]


def test_of_chosen_nodes_alone() -> None:
    module = graph_module()
    chosen = module.graph.find_nodes(op="call_function", target=aten.max.dim)
    assert graph_text(module, chosen).startswith("%max_dim : ")
    assert "\n" not in graph_text(module, chosen)
