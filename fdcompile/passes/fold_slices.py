"""Store the slices of weights that a stage reads instead of the whole weights."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from fdcompile.graph.weights import WeightSlice, copy_of

aten = torch.ops.aten


def dense_copy(weight: Tensor, part: WeightSlice) -> nn.Parameter:
    """Returns that part of `weight` as a parameter of its own."""
    return nn.Parameter(part.of(weight), requires_grad=False)


def fold_slices(
    graph_module: fx.GraphModule, part_of: Callable[[Tensor, WeightSlice], nn.Parameter] = dense_copy
) -> tuple[fx.GraphModule, dict[str, WeightSlice]]:
    """Copies `graph_module` with slices of weights as weights of their own, and returns the source of each.

    `split_skips` gives the two halves of a weight to two stages. A half is not dense in memory, so kernels would copy
    it at every call; a stage that is stored with its weights would hold the whole; and engines want a convolution's
    kernel to be a constant. `part_of` makes a weight of a slice, by default a copy.

    Correctness: a slice of a constant is a constant.

    Before::

        %weight : get_attr[conv.weight]
        %half : slice(%weight, 1, 0, 8)
        %conv : conv2d(%x, %half)

    After::

        %conv_weight_1_0_8 : get_attr[conv_weight_1_0_8]
        %conv : conv2d(%x, %conv_weight_1_0_8)

    Requires: `partition`. Ensures: no slice of a weight is left; what is no slice is shared with `graph_module`.
    """
    folded = copy_of(graph_module)
    slices: dict[str, WeightSlice] = {}
    for node in folded.graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        weight, *place = node.args
        if weight.op != "get_attr" or len(place) != 3 or not all(isinstance(number, int) for number in place):
            continue
        dim, start, stop = place
        name = f"{weight.target}_{dim}_{start}_{stop}".replace(".", "_")
        if name not in slices:
            slices[name] = WeightSlice(str(weight.target), dim, start, stop)
            tensor: Tensor = operator.attrgetter(slices[name].path)(folded)
            folded.register_parameter(name, part_of(tensor, slices[name]))
        with folded.graph.inserting_before(node):
            constant = folded.graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
        folded.graph.erase_node(node)
    if not slices:
        return folded, slices
    folded.graph.eliminate_dead_code()
    return copy_of(folded), slices  # a copy has only the weights that it reads
