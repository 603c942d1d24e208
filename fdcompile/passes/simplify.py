"""Remove operations that have no effect in inference."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

aten = torch.ops.aten

ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
}


def simplify(graph_module: fx.GraphModule) -> bool:
    """Removes assertions, dropout that does nothing, operations that return their input, and dead code.

    Correctness: an assertion has no value; dropout in evaluation mode, ``x / 1.0``, ``x * 1``, a cast to the same
    dtype and a reshape or an expansion to the same shape return ``x`` bit for bit; a reshape of a reshape is one. Views
    become reshapes: whether ``x`` can be viewed depends on its strides, which kernels choose by batch size and device.

    Before::

        %norm : group_norm(%x, 8, %weight, %bias)
        %dropout : dropout(%norm, 0.0, False)
        %div : div(%dropout, 1.0)
        %conv : conv2d(%div, %kernel)

    After::

        %norm : group_norm(%x, 8, %weight, %bias)
        %conv : conv2d(%norm, %kernel)

    Requires: an ATen graph with ``val`` metadata. Ensures: no assertion, identity, view or unused node is left.
    """
    before = str(graph_module.graph)
    for node in list(graph_module.graph.nodes):
        if (node.op == "call_module" and node.target == "_guards_fn") or node.target in ASSERTIONS:
            graph_module.graph.erase_node(node)
            continue
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        if node.target is aten.reshape.default and node.args[0].target is aten.reshape.default:
            node.update_arg(0, node.args[0].args[0])
        if node.op == "call_function" and _is_identity(node):
            node.replace_all_uses_with(node.args[0], propagate_meta=False)
            graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    modified = str(graph_module.graph) != before
    if modified:
        graph_module.recompile()
    return modified


def _is_identity(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not _same_metadata(source, node):
        return False
    match node.target:
        case aten.dropout.default:
            return bool(node.args[1] == 0 or node.args[2] is False)
        case aten.div.Tensor | aten.mul.Tensor:
            return not node.kwargs and isinstance(node.args[1], int | float) and node.args[1] == 1
        case aten.to.dtype | aten.to.dtype_layout | aten.expand.default | aten.alias.default | aten.detach.default:
            return True
        case aten.reshape.default:
            return True
        case aten.slice.Tensor:
            return all(isinstance(size, int) for size in source.meta["val"].shape)
    return False


def _same_metadata(source: fx.Node, node: fx.Node) -> bool:
    old, new = source.meta.get("val"), node.meta.get("val")
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return False
    same_type: bool = old.dtype == new.dtype and old.device == new.device
    return same_type and old.ndim == new.ndim and bool(statically_known_true(sym_eq(old.shape, new.shape)))
