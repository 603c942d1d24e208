"""Compute a stage for several steps at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fdcompile.passes.simplify import simplify
from fdcompile.program import Stage, copy_of

aten = torch.ops.aten

# Operations kept whole under vmap, and the positions of their arguments that carry the batch.
_BATCHED_ARGUMENTS = {
    aten.conv2d.default: (0,),
    aten.group_norm.default: (0,),
    aten.layer_norm.default: (0,),
    aten.linear.default: (0,),
    aten.scaled_dot_product_attention.default: (0, 1, 2, 3),
    aten.upsample_nearest2d.vec: (0,),
}

_library = torch.library.Library("fdcompile", "DEF")  # type: ignore[no-untyped-call]


def batch_steps(stage: Stage, arguments: Sequence[Tensor]) -> fx.GraphModule:
    """Traces ``torch.func.vmap`` of `stage` over the steps of a group into a plain ATen graph.

    `arguments` are what the stage is called with: those of `stage.stepwise_inputs` have a leading axis of one entry a
    step, and so will every output; features, prompt values and weights are shared by all steps. vmap fixes the number
    of steps and the batch size, so there is one graph for each.

    Why it is right: vmap computes the stage once per slice by definition. Convolution, normalisation, linear,
    attention and upsampling treat the entries of their batch independently, so their rule folds the step axis into
    the batch and keeps the operation whole: no decomposition, no per-slice loop, the same kernels as one step.

    Before (inputs ``feature[B, C, H, W]``, ``temb[B, C, 1, 1]``)::

        %add : add(%feature, %temb)
        %conv : conv2d(%add, %weight)

    After, for 3 steps and a batch of 2 (``temb[3, 2, C, 1, 1]``)::

        %add : add(%feature, %temb)
        %fold : view(%add, [6, C, H, W])
        %conv : conv2d(%fold, %weight)
        %unfold : view(%conv, [3, 2, C, H, W])

    Requires: `partition`. Ensures: no ``vmap``, functorch or ``fdcompile::`` operation is left in the graph.
    """
    whole = _keep_whole(stage.graph_module)
    weights = dict(whole.named_parameters()) | dict(whole.named_buffers())
    in_dims = tuple(0 if value.name in stage.stepwise_inputs else None for value in stage.inputs)
    fake_mode = FakeTensorMode()

    def run(values: list[Tensor], weight_values: list[Tensor]) -> Any:
        def one_step(*inputs: Tensor) -> Any:
            named = dict(zip(weights, weight_values, strict=True))
            return torch.func.functional_call(whole, named, inputs)

        return torch.func.vmap(one_step, in_dims=in_dims)(*values)

    fakes = [[fake_mode.from_tensor(t.detach()) for t in tensors] for tensors in (arguments, weights.values())]
    with torch.no_grad():
        traced = make_fx(run, tracing_mode="fake")(*fakes)
    return _with_weights(traced, stage, list(weights))


def _keep_whole(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of `graph_module` that calls the wrapped operations."""
    whole = copy_of(graph_module)
    for node in whole.graph.nodes:
        node.target = _WRAPPED.get(node.target, node.target)
    whole.recompile()
    return whole


def _with_weights(traced: fx.GraphModule, stage: Stage, weights: list[str]) -> fx.GraphModule:
    """Turns the weight inputs of `traced` back into attributes and the wrapped operations into ATen ones."""
    unwrapped = {wrapped: original for original, wrapped in _WRAPPED.items()}
    traced.graph.eliminate_dead_code()
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, stage.inputs, strict=False):
        copies[node] = graph.placeholder(value.name)
    for node, name in zip(placeholders[len(stage.inputs) :], weights, strict=True):
        copies[node] = graph.get_attr(name)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            copies[node].meta = dict(node.meta)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].target = unwrapped.get(node.target, node.target)
    batched = fx.GraphModule(stage.graph_module, graph, class_name=f"{stage.name}_steps")
    simplify(batched)
    return batched


def _wrap(op: torch._ops.OpOverload, batched: tuple[int, ...]) -> torch._ops.OpOverload:
    """Registers ``fdcompile::<op>``: the same operation, opaque to tracing, with a folding rule for vmap."""
    schema = str(op._schema)
    name = op._schema.name.removeprefix("aten::")
    signature = schema[schema.index("(") :]
    _library.define(name + signature)  # type: ignore[no-untyped-call]
    _library.impl(name, op, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    wrapped: torch._ops.OpOverload = getattr(torch.ops.fdcompile, name).default
    torch.library.register_vmap(wrapped, _fold(wrapped, batched), lib=_library)
    return wrapped


def _fold(op: torch._ops.OpOverload, batched: tuple[int, ...]) -> Callable[..., tuple[Tensor, int]]:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **kwargs: Any) -> tuple[Tensor, int]:
        for position, dim in enumerate(in_dims):
            if isinstance(dim, int) and position not in batched:
                raise RuntimeError(f"{op}: argument {position} differs between steps, only {batched} may")
        folded = list(args)
        for position in batched:
            if position < len(args) and isinstance(args[position], Tensor):
                folded[position] = _with_steps(args[position], in_dims[position], info.batch_size).flatten(0, 1)
        return op(*folded, **kwargs).unflatten(0, (info.batch_size, -1)), 0

    return rule


def _with_steps(tensor: Tensor, dim: int | None, steps: int) -> Tensor:
    if dim is None:
        return tensor.expand(steps, *tensor.shape)
    return tensor.movedim(dim, 0) if dim else tensor


_WRAPPED = {op: _wrap(op, batched) for op, batched in _BATCHED_ARGUMENTS.items()}
