"""Exports a UNet call as one ATen graph."""

from __future__ import annotations

import contextlib
import inspect
import operator
import random
import traceback
import warnings
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from fdcompile.capture.call import Signature, UNetCall, per_latents
from fdcompile.capture.guards.reach import MACHINERY
from fdcompile.capture.value_reads import VALUES_READ, ValueReads
from fdcompile.errors import CaptureError
from fdcompile.graph.program import module_path
from fdcompile.graph.ranges import Sides
from fdcompile.graph.weights import copy_of

_MAX_BATCH = 63
"""Largest symbolic batch size for export, because diffusers' upsampler branches at 64: it makes its input contiguous.
The values are equal, so the graph serves any batch size."""


class StatefulError(CaptureError):
    """The UNet writes to a tensor that it keeps between calls."""


_Attributes = list[tuple[dict[str, Any], dict[str, Any]]]
"""Live attributes of each module, and copies of them."""


class _Recorded(nn.Module):
    """Calls the UNet with the recorded arguments, in which it inserts the tensors.

    `left` receives the attributes of the modules after the call, since export restores them.
    """

    def __init__(self, unet: nn.Module, arguments: dict[str, Any], left: _Attributes, reads: ValueReads) -> None:
        super().__init__()
        self.unet = unet
        self._left = left
        self._reads = reads
        _, *parameters = inspect.signature(type(unet).forward).parameters.values()
        required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
        arguments = dict.fromkeys(required) | arguments
        leaves, self._tree = pytree.tree_flatten(arguments)
        self._constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]

    def forward(self, *tensors: Tensor) -> Tensor:
        remaining = iter(tensors)
        leaves = [next(remaining) if constant is None else constant[0] for constant in self._constants]
        arguments = pytree.tree_unflatten(leaves, self._tree)
        # The forward of the class: hooks and wrappers of the UNet run at each call, outside of the graph.
        with self._reads, self._reads.in_operators:
            output: Tensor = type(self.unet).forward(self.unet, **arguments, return_dict=False)[0]
        self._left[:] = [(vars(module), _instance_attributes(module)) for module in self.unet.modules()]
        return output


@dataclass(frozen=True)
class AnySize:
    """Symbolic sizes of a graph that serves several heights and widths.

    Attributes:
        sides: heights and widths that the graph serves.
        axes: for each tensor of the call, the axes that are a fraction of the latents' height ("H") or width ("W").
    """

    sides: Sides
    axes: tuple[dict[int, tuple[str, Fraction]], ...]

    def dims(self) -> list[dict[int, Any]]:
        """Dynamic shapes for ``torch.export``."""
        multiple, symbols = self.sides.latent_multiple, self.sides.dims()
        return [
            {axis: int(multiple * part) * symbols[name] for axis, (name, part) in axes.items() if name in symbols}
            for axes in self.axes
        ]


def capture(
    unet: nn.Module, call: UNetCall, symbolic_batch: bool = True, sizes: AnySize | None = None
) -> fx.GraphModule:
    """Exports `unet` for the signature of `call`, with a symbolic batch size or for the batch size of `call` only.

    With `sizes` height and width are also symbolic, and `call` has the usual size.

    The graph shares the UNet's parameters and does not decompose convolution, normalization and attention. Its inputs
    are `call.tensors` in order, labeled with their binding times. Its ``meta[VALUES_READ]`` says whether Python code
    read values of tensors. Side effects of the UNet's Python code remain.

    Raises:
        CaptureError: torch.export failed, or the UNet draws random numbers.
        StatefulError: the UNet writes to a tensor of its own.
    """
    examples = tuple(tensor.detach().clone() for tensor in call.tensors)
    shapes: list[dict[int, Any]] = [{} for _ in examples] if sizes is None else sizes.dims()
    if symbolic_batch:
        has_batch = [per_latents(tensor, call.batch) == 1 for tensor in call.tensors]
        batch = Dim("batch", min=2, max=_MAX_BATCH)
        shapes = [{0: batch} | shape if batched else shape for batched, shape in zip(has_batch, shapes, strict=True)]
        examples = tuple(
            _two_of(tensor) if batched else tensor for tensor, batched in zip(examples, has_batch, strict=True)
        )
    left: _Attributes = []
    reads = ValueReads()
    generators = random.getstate(), np.random.get_state()
    try:
        with _mode_of(unet), torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The tensor attribute")  # `Guards` detects those
            program = export(
                _Recorded(unet, call.arguments, left, reads), examples, dynamic_shapes=(tuple(shapes),), strict=False
            )
    except Exception as error:
        place, advice = _place(unet, error)
        raise CaptureError(
            f"{type(unet).__name__} could not be exported{place}: {type(error).__name__}: {error}\n"
            f"{advice}, or call fdcompile.restore(pipe)."
        ) from error
    for attributes, values in left:
        attributes.update(values)
    drawn = [f"{module_path(node) or 'its forward'} ({node.target})" for node in program.graph.nodes if _draws(node)]
    if _have_drawn(*generators):
        drawn.append("its forward (Python's or NumPy's generator)")
    if drawn:
        raise CaptureError(
            f"{type(unet).__name__} draws random numbers in {drawn[0]}, and a graph would draw different ones. "
            f"Switch that off (unet.eval(); tomesd.apply_patch(unet, use_rand=False)), or call fdcompile.restore(pipe)."
        )
    if any(_writes(node) for node in program.graph.nodes):
        try:
            program = program.run_decompositions({})  # functional, and otherwise as it was
        except RuntimeError as error:
            raise StatefulError(f"{type(unet).__name__} could not be exported: {error}") from error
    module = copy_of(program.module(check_guards=False))
    placeholders = module.graph.find_nodes(op="placeholder")
    for node, name, time in zip(placeholders, call.signature.names, call.signature.times, strict=True):
        node.name = node.target = name
        node.meta["binding_time"] = time
    _set_constants_apart(module, unet)
    _release(placeholders[0].meta["val"].fake_mode.shape_env)
    module.recompile()
    module.meta[VALUES_READ] = reads.found
    return module


def _release(environment: ShapeEnv) -> None:
    """Drops export's record of a trace, which the garbage collector cannot free: its tensors hold symbolic sizes."""
    if environment.tracked_fakes is not None:
        environment.tracked_fakes.clear()
    environment.fake_tensor_cache.clear()
    FakeTensorMode.cache_clear()
    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()


def _set_constants_apart(module: fx.GraphModule, unet: nn.Module) -> None:
    """Renames constants, such as tensors of attention processors, which export stores among the weights of ``unet``."""
    weights = chain(unet.named_parameters(remove_duplicate=False), unet.named_buffers(remove_duplicate=False))
    paths = {f"unet.{path}" for path, _ in weights}
    constants = sorted({str(node.target) for node in module.graph.find_nodes(op="get_attr")} - paths)
    names = {path: f"constant_{number}" for number, path in enumerate(constants)}
    for path, name in names.items():
        module.register_buffer(name, operator.attrgetter(path)(module))
    for node in module.graph.find_nodes(op="get_attr"):
        node.target = names.get(str(node.target), node.target)


def _instance_attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module other than those of ``nn.Module``."""
    return {name: value for name, value in vars(module).items() if name not in MACHINERY}


def capture_widest(
    unet: nn.Module, call: UNetCall, symbolic_batch: bool = True, sizes: AnySize | None = None
) -> tuple[Signature, fx.GraphModule]:
    """Captures a graph for any batch size if possible and `symbolic_batch` is set, else for the batch size of `call`.

    With `sizes` the graph serves several heights and widths.

    Returns:
        The signature that the graph serves, and the graph.

    Raises:
        CaptureError: the UNet cannot be exported.
    """
    if symbolic_batch and call.one_entry_a_latent:
        try:
            return call.signature, capture(unet, call, sizes=sizes)
        except StatefulError:
            raise
        except CaptureError:  # such as perturbed attention, which converts it to an int
            pass
    return call.fixed_signature, capture(unet, call, symbolic_batch=False, sizes=sizes)


def _mode_of(unet: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Inference mode if the UNet was made in it, since export sets attributes on copies of its weights."""
    weights = (*unet.parameters(), *unet.buffers())
    return torch.inference_mode() if any(weight.is_inference() for weight in weights) else contextlib.nullcontext()


def _place(unet: nn.Module, error: Exception) -> tuple[str, str]:
    """Names the innermost module of `unet` in the traceback, its or its processor's line, and a remedy."""
    paths = {module: path for path, module in unet.named_modules()}
    module, line, advice = None, "", "Its weights may be at fault: load it with from_pretrained, without conversions"
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        inside = isinstance(owner, nn.Module) and owner in paths
        processor = not isinstance(owner, nn.Module) and owner is getattr(module, "processor", unet)
        if inside or processor:
            module = owner if inside else module
            summary = traceback.FrameSummary(frame.f_code.co_filename, number, frame.f_code.co_name)
            line = f"at {summary.line!r} ({summary.filename}, line {number})"
            part = "an attention processor" if processor else f"a {type(owner).__name__}"
            advice = f"Use {part} there that consists of tensor operations"
    return (f" in {paths[module] or 'its forward'} {line}" if module is not None else ""), advice


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _draws(node: fx.Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    if node.target is torch.ops.aten.dropout.default:
        _, probability, training = node.args
        return bool(probability and training)
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p"))
    return True


def _have_drawn(python: Any, numpy: Any) -> bool:
    """Whether Python's or NumPy's generator has left this state, to which it is set back."""
    now = np.random.get_state()
    if random.getstate() == python and all(map(np.array_equal, now, numpy)):
        return False
    random.setstate(python)
    np.random.set_state(numpy)
    return True


def _two_of(tensor: Tensor) -> Tensor:
    """Example of `tensor` with a batch of two: export specializes to one, and larger batches may exceed the range."""
    return tensor[torch.arange(2, device=tensor.device) % len(tensor)]
