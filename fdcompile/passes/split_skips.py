"""Compute the skip's half of a decoder convolution once per group."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fdcompile.graph.program import BindingTime
from fdcompile.passes.bind import bind

aten = torch.ops.aten

_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}

_POINTWISE = {
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.mish.default,
    aten.leaky_relu.default,
}


def split_skips(graph_module: fx.GraphModule, cut: Collection[str]) -> bool:
    """Splits ``conv(act(group_norm(cat(a, b))))`` and ``conv(cat(a, b))`` where one half is known per group.

    The same holds for linear layers.

    Correctness: a convolution is linear in its input channels, so it is the sum of the convolutions of two
    channel ranges; an activation is pointwise; group normalization treats groups of channels one by one, so it splits
    where a group ends. The one group that straddles ``a | b`` stays with the half that changes at every step. Sums are
    associated in another order, so floating point results differ in their last digits.

    Before, with ``%h [step]`` of 8 channels, ``%skip [key]`` of 4 and groups of 3::

        %cat : cat([%h, %skip], 1)
        %norm : group_norm(%cat, 4, %weight, %bias)
        %act : silu(%norm)
        %conv : conv2d(%act, %kernel, %offset)

    After::

        %mixed [step] : cat([%h, %skip[:, :1]], 1)
        %norm_a [step] : group_norm(%mixed, 3, %weight[:9], %bias[:9])
        %conv_a [step] : conv2d(silu(%norm_a), %kernel[:, :9], %offset)
        %norm_b [key] : group_norm(%skip[:, 1:], 1, %weight[9:], %bias[9:])
        %conv_b [key] : conv2d(silu(%norm_b), %kernel[:, 9:])
        %conv [step] : add(%conv_a, %conv_b)

    Requires: `bind`. Ensures: labels are up to date; a concatenation whose halves are known at the same time, or which
    is read by anything else, is left alone.
    """
    modified = False
    for node in list(graph_module.graph.nodes):
        if node.target is not aten.cat.default:
            continue
        for split in [matched for user in node.users if (matched := _match(node, user))]:
            _rewrite(graph_module.graph, split)
            modified = True
    if modified:
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
        bind(graph_module, cut)
    return modified


@dataclass(frozen=True)
class _Split:
    """`convolution` reads `cat`, directly or behind `norm` and `activation`, and splits at channel `channel`."""

    cat: fx.Node
    norm: fx.Node | None
    activation: fx.Node | None
    convolution: fx.Node
    channel: int


def _match(cat: fx.Node, user: fx.Node) -> _Split | None:
    halves: Any = cat.args[0]
    if len(halves) != 2 or len(cat.args) != 2:
        return None
    times = [half.meta["binding_time"] for half in halves]
    if set(times) != {BindingTime.KEY, BindingTime.STEP}:
        return None
    dim = _concatenated_dim(cat)
    first, total = halves[0].meta["val"].shape[dim], cat.meta["val"].shape[dim]
    if user.args[0] is cat and _input_dim(user) == dim:
        return _Split(cat, None, None, user, first)
    if user.target is not aten.group_norm.default or user.args[0] is not cat or len(user.args) < 4:
        return None
    activation = _only_user(user)
    convolution = _only_user(activation) if activation is not None and activation.target in _POINTWISE else None
    if convolution is None or not _input_dim(convolution) == dim == 1 or convolution.args[0] is not activation:
        return None
    groups: Any = user.args[1]
    size = total // groups
    channel = first // size * size if times[0] is BindingTime.KEY else -(-first // size) * size
    return _Split(cat, user, activation, convolution, channel) if 0 < channel < total else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _concatenated_dim(cat: fx.Node) -> int:
    dim: Any = cat.args[1]
    return int(dim % cat.meta["val"].ndim)


def _input_dim(node: fx.Node) -> int | None:
    """The input dimension over which `node` multiplies and sums with a weight; None for other operations."""
    groups: Any = node.args[6] if len(node.args) > 6 else 1
    if node.kwargs or groups != 1:
        return None
    if node.target is aten.linear.default:
        source: Any = node.args[0]
        return int(source.meta["val"].ndim - 1)
    return 1 if node.target in _CONVOLUTIONS else None


def _rewrite(graph: fx.Graph, split: _Split) -> None:
    total = split.cat.meta["val"].shape[_concatenated_dim(split.cat)]
    with graph.inserting_before(split.convolution):
        terms = []
        for start, stop in ((0, split.channel), (split.channel, total)):
            x = _channels(graph, split.cat, start, stop)
            if split.norm is not None and split.activation is not None:
                norm_arguments: Any = split.norm.args
                _, groups, weight, bias, *rest = norm_arguments
                part_groups = groups * (stop - start) // total
                scale = [p if p is None else _slice(graph, split.norm, p, 0, start, stop) for p in (weight, bias)]
                x = _call(graph, split.norm, aten.group_norm.default, x, part_groups, *scale, *rest)
                activation = split.activation
                x = _call(graph, activation, activation.target, x, *activation.args[1:], **activation.kwargs)
            _, weight, *rest = split.convolution.args
            if start and rest:
                rest[0] = None
            kernel = _slice(graph, split.convolution, weight, 1, start, stop)
            terms.append(_call(graph, split.convolution, split.convolution.target, x, kernel, *rest))
        total_term = _call(graph, split.convolution, aten.add.Tensor, *terms)
    split.convolution.replace_all_uses_with(total_term)
    graph.erase_node(split.convolution)
    for node in (split.activation, split.norm):
        if node is not None:
            graph.erase_node(node)


def _channels(graph: fx.Graph, cat: fx.Node, start: int, stop: int) -> fx.Node:
    """Channels `start` to `stop` of `cat`, without concatenating more than that."""
    parts = []
    offset = 0
    dim = _concatenated_dim(cat)
    halves: Any = cat.args[0]
    for half in halves:
        size = half.meta["val"].shape[dim]
        low, high = max(start - offset, 0), min(stop - offset, size)
        if low < high:
            parts.append(half if (low, high) == (0, size) else _slice(graph, cat, half, dim, low, high))
        offset += size
    return parts[0] if len(parts) == 1 else _call(graph, cat, aten.cat.default, parts, dim)


def _slice(graph: fx.Graph, origin: fx.Node, tensor: Any, dim: int, start: int, stop: int) -> fx.Node:
    return _call(graph, origin, aten.slice.Tensor, tensor, dim, start, stop)


def _call(graph: fx.Graph, origin: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node with the module of `origin`."""
    node = graph.call_function(target, args, kwargs)
    node.meta = {name: origin.meta[name] for name in ("nn_module_stack",) if name in origin.meta}
    values = fx.node.map_arg((args, kwargs), lambda source: source.meta["val"])
    node.meta["val"] = target(*values[0], **values[1])
    return node
