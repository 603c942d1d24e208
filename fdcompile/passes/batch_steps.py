"""Compute a stage for several steps at once."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from fdcompile.graph.program import Stage
from fdcompile.graph.weights import copy_of, lift_weights
from fdcompile.passes.simplify import simplify

aten = torch.ops.aten

# Operations kept whole under vmap, and the positions of their arguments that carry the batch. torch's own rules would
# decompose them, fix the sizes, or compute slice by slice.
_BATCHED_ARGUMENTS = {
    aten.avg_pool2d.default: (0,),
    aten.conv1d.default: (0,),
    aten.conv2d.default: (0,),
    aten.conv3d.default: (0,),
    aten.conv_transpose2d.input: (0,),
    aten.copy.default: (0, 1),
    aten.fft_fftn.default: (0,),
    aten.fft_fftshift.default: (0,),
    aten.fft_ifftn.default: (0,),
    aten.fft_ifftshift.default: (0,),
    aten.group_norm.default: (0,),
    aten.layer_norm.default: (0,),
    aten.linear.default: (0,),
    aten.pad.default: (0,),
    aten.pixel_shuffle.default: (0,),
    aten.scaled_dot_product_attention.default: (0, 1, 2, 3),
    aten.upsample_bilinear2d.vec: (0,),
    aten.upsample_nearest2d.vec: (0,),
    # These take a dimension, which must not be the batch.
    aten.gather.default: (0, 2),
    aten.scatter.src: (0, 2, 3),
    aten.scatter_reduce.two: (0, 2, 3),
}

_library = torch.library.Library("fdcompile", "DEF")  # type: ignore[no-untyped-call]


def batch_steps(stage: Stage) -> fx.GraphModule:
    """Traces ``torch.func.vmap`` of `stage` over the steps of a group into a plain ATen graph.

    The inputs of `stage.stepwise_inputs` get a leading axis of one entry a step, and so do all outputs; features,
    prompt values and weights are shared by all steps. The number of steps and the batch size stay symbolic: one graph
    serves every group.

    Correctness: vmap computes the stage once per slice by definition. Convolution, normalization, linear,
    attention and resampling treat the entries of their batch independently, so their rule folds the step axis into
    the batch and keeps the operation whole: no decomposition, no per-slice loop, the same kernels as one step.

    Before (inputs ``feature[B, C, H, W]``, ``temb[B, C, 1, 1]``)::

        %add : add(%feature, %temb)
        %conv : conv2d(%add, %weight)

    After (``temb[steps, B, C, 1, 1]``)::

        %add : add(%feature, %temb)
        %fold : reshape(%add, [steps * B, C, H, W])
        %conv : conv2d(%fold, %weight)
        %unfold : reshape(%conv, [steps, B, C, H, W])

    Requires: `partition`. Ensures: no ``vmap``, functorch or ``fdcompile::`` operation is left in the graph.

    Raises:
        NotImplementedError: an operation of the stage fails under vmap, or fixes the number of steps, the batch size or
            a symbolic height or width, or a weight (of torchao's in float8) becomes a constant.
    """
    traced, steps, batch = trace_steps(stage)
    batched = _with_weights(traced, stage)
    _share_sizes(batched.graph, steps, batch)
    simplify(batched)
    return batched


def trace_steps(stage: Stage) -> tuple[fx.GraphModule, torch.SymInt, torch.SymInt]:
    """``vmap`` of `stage`, with its weights as inputs before the others, the number of steps, and the batch size."""
    whole, weights = lift_weights(_keep_whole(stage.graph_module))
    in_dims = [None] * len(weights) + [0 if value.name in stage.stepwise_inputs else None for value in stage.inputs]
    environment = ShapeEnv()
    fake_mode = FakeTensorMode(shape_env=environment)
    fake_mode.cache_enabled = False  # with symbolic sizes a look-up costs more than it saves
    examples = (("steps", 5), ("batch", 3), ("height", 7), ("width", 11))
    steps, batch, *sides = (_symbol(environment, name, example) for name, example in examples)
    height, width = (stage.multiple * side for side in sides)
    fakes: list[Tensor] = [fake_mode.from_tensor(weight.detach(), static_shapes=True) for weight in weights]
    with torch.no_grad(), fake_mode:
        for value, dim in zip(stage.inputs, in_dims[len(weights) :], strict=True):
            size = value.size_for(batch, None if dim is None else steps, (height, width))
            fakes.append(torch.empty(size, dtype=value.dtype, device=stage.device))
        one_step = _Watching(whole, steps, batch, *sides).run
        traced = make_fx(torch.func.vmap(one_step, in_dims=tuple(in_dims)))(*fakes)
    traced.graph.eliminate_dead_code()
    return traced, steps, batch


def _symbol(environment: ShapeEnv, name: str, example: int) -> Any:
    source = ConstantSource(name)
    expression = environment.create_symbol(example, source, DimDynamic.DYNAMIC)
    return environment.create_symintnode(expression, hint=example, source=source)


def _keep_whole(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of `graph_module` that calls the operations of `_wrap`."""
    whole = copy_of(graph_module)
    for node in whole.graph.nodes:
        node.target = _WRAPPED.get(node.target, node.target)
        if node.target is aten.sym_size.int:
            node.target = _size  # vmap has no rule for the operation itself
    whole.recompile()
    return whole


def _size(tensor: Tensor, dim: int) -> Any:
    return tensor.shape[dim]


class _Watching(fx.Interpreter):
    """Runs a graph, and stops at the first operation that fails or makes a number of one of `sizes`."""

    def __init__(self, graph_module: fx.GraphModule, *sizes: Any) -> None:
        super().__init__(graph_module)
        self._sizes = sizes

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:
            raise NotImplementedError(f"vmap cannot take {n.target} ({n.name}): {error}") from error
        if any(size.node.expr.is_number for size in self._sizes):
            raise NotImplementedError(f"vmap fixes a size that must remain symbolic at {n.target} ({n.name})")
        return result


def _with_weights(traced: fx.GraphModule, stage: Stage) -> fx.GraphModule:
    """Turns the weight inputs of `traced` back into attributes and the wrapped operations into ATen ones."""
    unwrapped = {wrapped: original for original, wrapped in _WRAPPED.items()}
    if constants := traced.graph.find_nodes(op="get_attr"):
        raise NotImplementedError(f"vmap makes a constant of a quantized weight ({constants[0].name})")
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    placeholders = traced.graph.find_nodes(op="placeholder")
    weights = [node.target for node in stage.graph_module.graph.find_nodes(op="get_attr")]
    for node, value in zip(placeholders[len(weights) :], stage.inputs, strict=True):
        copies[node] = graph.placeholder(value.name)
    for node, name in zip(placeholders, weights, strict=False):
        copies[node] = graph.get_attr(name)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            copies[node].meta = dict(node.meta) | {"stepwise": copies[node].name in stage.stepwise_inputs}
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].target = unwrapped.get(node.target, node.target)
    return fx.GraphModule(stage.graph_module, graph, class_name=f"{stage.name}_steps")


def _share_sizes(graph: fx.Graph, steps: Any, batch: Any) -> None:
    """Reads the number of steps and the batch size once, from the first stepwise input, and multiplies them once."""
    inputs = graph.find_nodes(op="placeholder")
    stepwise = next(node for node in inputs if node.meta["stepwise"])
    with graph.inserting_before(inputs[-1].next):
        sizes = [graph.call_function(aten.sym_size.int, (stepwise, dim)) for dim in (0, 1)]
        sizes.append(graph.call_function(operator.mul, tuple(sizes)))
    shared: dict[Any, fx.Node] = {}
    for node, size in zip(sizes, (steps, batch, steps * batch), strict=True):
        node.meta["val"] = size
        shared[size.node.expr] = node
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and (same := shared.get(value.node.expr, node)) is not node:
            node.replace_all_uses_with(same, propagate_meta=False)
    graph.eliminate_dead_code()


def _wrap(op: torch._ops.OpOverload, rule: Callable[..., Callable[..., tuple[Tensor, int]]]) -> torch._ops.OpOverload:
    """Registers ``fdcompile::<op>``: the same operation, opaque to tracing, with a rule for vmap."""
    schema = str(op._schema)
    name = op._schema.name.removeprefix("aten::")
    signature = schema[schema.index("(") :]
    _library.define(name + signature)  # type: ignore[no-untyped-call]
    _library.impl(name, op, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    wrapped: torch._ops.OpOverload = getattr(torch.ops.fdcompile, name).default
    fake: Callable[..., Tensor] = _FAKES.get(op, op)
    torch.library.register_fake(f"fdcompile::{name}", lambda *args, **kwargs: fake(*args, **kwargs), lib=_library)
    torch.library.register_vmap(wrapped, rule(wrapped), lib=_library)
    return wrapped


def _resized(tensor: Tensor, size: list[int] | None, *others: Any) -> Tensor:
    """Empty result of resampling, since torch's own rule does not support symbolic sizes."""
    *_, factors = others
    scaled = [
        side * (int(factor) if factor == int(factor) else factor)
        for side, factor in zip(tensor.shape[2:], factors or (), strict=False)
    ]
    return tensor.new_empty((*tensor.shape[:2], *(size or map(torch.sym_int, scaled))))


def _normalized(tensor: Tensor, *others: Any) -> Tensor:
    """Empty result of a normalization, since torch's own rule would decompose it."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


_FAKES: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {
    aten.group_norm.default: _normalized,
    aten.layer_norm.default: _normalized,
    aten.upsample_bilinear2d.vec: _resized,
    aten.upsample_nearest2d.vec: _resized,
}


def _fold(batched: tuple[int, ...], op: torch._ops.OpOverload) -> Callable[..., tuple[Tensor, int]]:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **kwargs: Any) -> tuple[Tensor, int]:
        for position, dim in enumerate(in_dims):
            if isinstance(dim, int) and position not in batched:
                raise RuntimeError(f"{op}: argument {position} differs between steps, only {batched} may")
        folded = list(args)
        for position in batched:
            if position < len(args) and isinstance(args[position], Tensor):
                folded[position] = _with_steps(args[position], in_dims[position], info.batch_size).flatten(0, 1)
        if op._schema.arguments[1].name == "dim" and args[1] % folded[0].ndim == 0:
            raise RuntimeError(f"{op}: dimension {args[1]} is the batch")
        return op(*folded, **kwargs).unflatten(0, (info.batch_size, -1)), 0

    return rule


def _concatenate(op: torch._ops.OpOverload) -> Callable[..., tuple[Tensor, int]]:
    def rule(info: Any, in_dims: tuple[Any, ...], tensors: list[Tensor], dim: int = 0) -> tuple[Tensor, int]:
        pairs = zip(tensors, in_dims[0], strict=True)
        with_steps = [_with_steps(tensor, axis, info.batch_size) for tensor, axis in pairs]
        return op(with_steps, dim + 1 if dim >= 0 else dim), 0

    return rule


def _scatter_slice(op: torch._ops.OpOverload) -> Callable[..., tuple[Tensor, int]]:
    def rule(
        info: Any, in_dims: tuple[Any, ...], into: Tensor, source: Tensor, dim: int = 0, *place: Any
    ) -> tuple[Tensor, int]:
        with_steps = [
            _with_steps(tensor, axis, info.batch_size) for tensor, axis in ((into, in_dims[0]), (source, in_dims[1]))
        ]
        return op(*with_steps, dim + 1 if dim >= 0 else dim, *place), 0

    return rule


def _with_steps(tensor: Tensor, dim: int | None, steps: int) -> Tensor:
    if dim is None:
        return tensor.expand(steps, *tensor.shape)
    return tensor.movedim(dim, 0) if dim else tensor


_WRAPPED = {op: _wrap(op, functools.partial(_fold, batched)) for op, batched in _BATCHED_ARGUMENTS.items()}
_WRAPPED[aten.slice_scatter.default] = _wrap(aten.slice_scatter.default, _scatter_slice)  # of any dimension
_WRAPPED[aten.cat.default] = _wrap(aten.cat.default, _concatenate)  # torch's own rule fixes every size
