"""FLOPs of a graph's operations."""

from __future__ import annotations

import torch
from torch import fx

from fdcompile.graph.flops import FlopInterpreter, concrete_shape, count_flops


def test_those_of_the_operations_add_up_to_those_of_the_graph(captured: fx.GraphModule) -> None:
    inputs = [concrete_shape(node.meta["val"], 4) for node in captured.graph.find_nodes(op="placeholder")]
    assert [tuple(shape.size) for shape in inputs] == [(4, 4, 8, 8), (4,), (4, 7, 32)]
    by_node = FlopInterpreter(captured).count(inputs)
    assert sum(by_node.values()) == count_flops(captured, inputs) > 0
    counted = {node.target for node, flops in by_node.items() if flops}
    aten = torch.ops.aten
    assert counted == {aten.conv2d.default, aten.linear.default, aten.scaled_dot_product_attention.default}
