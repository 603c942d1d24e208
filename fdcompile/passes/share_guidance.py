"""Compute what guidance duplicates once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from fdcompile.graph.program import BindingTime

aten = torch.ops.aten

_INDEPENDENT = {
    aten.add.Tensor,
    aten.cat.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.div.Tensor,
    aten.expand.default,
    aten.gelu.default,
    aten.group_norm.default,
    aten.layer_norm.default,
    aten.linear.default,
    aten.mul.Tensor,
    aten.neg.default,
    aten.permute.default,
    aten.reshape.default,
    aten.scaled_dot_product_attention.default,
    aten.silu.default,
    aten.slice.Tensor,
    aten.sub.Tensor,
    aten.to.dtype,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.upsample_nearest2d.vec,
}
"""Operations that treat the entries of dimension 0 one by one as long as it has the batch's size before and after."""


def share_guidance(graph_module: fx.GraphModule, cut: Collection[str]) -> bool:
    """Labels what reads the latent and the time but not the prompt, so that it becomes a stage of its own.

    Under classifier-free guidance a pipeline stacks the same latent two or three times, once a prompt. The executor
    runs the ``shared`` stage for one copy and repeats what it returns, if and only if it finds the copies equal.

    Why it is right: every operation of the stage computes entry ``i`` of its result from the entries ``i`` of its
    inputs alone, and equal entries give equal results. That holds for the operations listed here while the batch is
    dimension 0 of all that they read and write; anything else ends the stage.

    Before::

        %conv_in [key] : conv2d(%sample, …)
        %resnet [key] : conv2d(add(%conv_in, %temb), …)
        %attention [key] : scaled_dot_product_attention(%resnet, %text_keys, …)

    After::

        %conv_in [key, shared]   %resnet [key, shared]   %attention [key]

    Where height and width are symbolic, the stage ends before the first attention: a border spells each of them alone.

    Requires: `bind`, and nothing after it that binds again. Ensures: no operation is changed; a lone convolution is
    not worth a stage and stays where it was.
    """
    shared: list[fx.Node] = []
    known: set[fx.Node] = set()
    batch: int | torch.SymInt = 0
    for node in graph_module.graph.nodes:
        time = node.meta.get("binding_time")
        if node.op == "placeholder" and time is BindingTime.LATENT:
            known.add(node)
            batch = node.meta["val"].shape[0]
        elif time in (BindingTime.LATENT, BindingTime.KEY) and _is_independent(node, known, batch):
            known.add(node)
            if time is BindingTime.KEY:
                shared.append(node)
    shared = _ending_in_maps(shared)
    if sum(node.target in (aten.conv2d.default, aten.conv3d.default) for node in shared) < 2:
        return False
    for node in shared:
        node.meta["binding_time"] = BindingTime.SHARED
    return True


def _ending_in_maps(shared: list[fx.Node]) -> list[fx.Node]:
    """`shared` without those at its end that have made one size of a height and a width, which no border can spell."""
    kept = dict.fromkeys(shared)
    for node in reversed(shared):
        if not kept.keys() >= node.users.keys() and any(_is_product(size) for size in node.meta["val"].shape):
            del kept[node]
    return list(kept)


def _is_product(size: int | torch.SymInt) -> bool:
    return isinstance(size, torch.SymInt) and len(size.node.expr.free_symbols) > 1


def _is_independent(node: fx.Node, known: set[fx.Node], batch: int | torch.SymInt) -> bool:
    tensors = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), torch.Tensor)]
    if node.target not in _INDEPENDENT or not _batch_first(node, batch):
        return False
    for source in tensors:
        time = source.meta["binding_time"]
        fixed = time is BindingTime.STATIC and not any(_reads(size, batch) for size in source.meta["val"].shape)
        if not fixed and not (_batch_first(source, batch) and (source in known or time is BindingTime.SCHEDULE)):
            return False
    return any(source in known for source in tensors)


def _batch_first(node: fx.Node, batch: int | torch.SymInt) -> bool:
    value: Any = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or not isinstance(batch, torch.SymInt):
        return False
    first, *rest = value.shape
    is_batch = isinstance(first, torch.SymInt) and first.node.expr == batch.node.expr and batch.node.expr.is_Symbol
    return bool(is_batch) and not any(_reads(size, batch) for size in rest)


def _reads(size: int | torch.SymInt, batch: int | torch.SymInt) -> bool:
    """Whether `size` follows from the batch's."""
    if not isinstance(size, torch.SymInt) or not isinstance(batch, torch.SymInt):
        return False
    return bool(size.node.expr.free_symbols & batch.node.expr.free_symbols)
