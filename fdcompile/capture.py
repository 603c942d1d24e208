"""UNet call -> one ATen graph."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.utils import _pytree as pytree

from fdcompile.program import BindingTime, copy_of, module_path

_INPUT_TIMES = {
    "sample": BindingTime.LATENT,
    "timestep": BindingTime.SCHEDULE,
    # Residuals of a ControlNet or T2I-Adapter follow the latent; they are read at key steps.
    "down_block_additional_residuals": BindingTime.KEY,
    "mid_block_additional_residual": BindingTime.KEY,
    "down_intrablock_additional_residuals": BindingTime.KEY,
}
"""Binding time of each UNet argument; any other tensor (text, class, added conditions, masks) is known per prompt."""

_MAX_BATCH = 63
"""diffusers' upsampler makes its input contiguous from batch 64 on. The values are the same, so the graph serves any
batch, but export holds it to this range."""

_REQUIRED = {"sample", "timestep"}


class CaptureError(RuntimeError):
    """The UNet could not be exported; the message names the module and the line, and says what to do."""


@dataclass(frozen=True)
class Signature:
    """What makes two UNet calls need different graphs: everything but the tensors' contents.

    Attributes:
        leaves: the path to each argument, nested ones included, and its value or, of a tensor, its type and shape
            without the batch.
        batch: number of latents, if the graph serves no other; None: it serves any.
    """

    leaves: tuple[tuple[tuple[Any, ...], Any], ...]
    batch: int | None = None


@dataclass(frozen=True)
class UNetCall:
    """One call of the UNet, taken apart.

    Attributes:
        signature: identifies the graph that can answer the call, if it takes any batch.
        arguments: by name, without those that are None; the timestep as ``[batch]``.
        timestep: as the caller passed it.
        tensors: all tensor arguments, in the order of the graph's inputs; among them the timestep, as ``[batch]``.
        names: name of each: the argument's, and for nested ones the path to it.
        times: binding time of each.
        batch: number of latents.
        return_dict: whether the caller wants an output object.
    """

    signature: Signature
    arguments: dict[str, Any]
    timestep: Any
    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    times: tuple[BindingTime, ...]
    batch: int
    return_dict: bool

    @classmethod
    def parse(cls, parameters: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> UNetCall:
        """Takes apart a call of a forward that has `parameters`.

        Raises:
            TypeError: the arguments do not fit.
        """
        arguments = _by_name(parameters, args, kwargs)
        return_dict = bool(arguments.pop("return_dict", True))
        sample = arguments["sample"]
        timestep = arguments["timestep"]
        arguments["timestep"] = _per_latent(timestep, sample)
        batch = sample.shape[0]
        leaves = list(_leaves((), arguments))
        signature = Signature(tuple((path, _static(value, batch)) for path, value in leaves))
        tensors = [(path, value) for path, value in leaves if isinstance(value, Tensor)]
        values = tuple(value for _, value in tensors)
        names = tuple("_".join(map(str, path)) for path, _ in tensors)
        times = tuple(_INPUT_TIMES.get(path[0], BindingTime.PROMPT) for path, _ in tensors)
        return cls(signature, arguments, timestep, values, names, times, batch, return_dict)

    @cached_property
    def fixed_signature(self) -> Signature:
        """Identifies the graph that can answer this call and those of the same batch."""
        return Signature(self.signature.leaves, self.batch)

    @property
    def one_entry_a_latent(self) -> bool:
        """Whether the batch is nothing but latents: a video's frames are folded into it, or unfolded from it."""
        counts = [_per_latents(tensor, self.batch) for tensor in self.tensors]
        return max(counts) == 1 and self.tensors[self.names.index("sample")].ndim == 4

    def of_time(self, time: BindingTime) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor, own in zip(self.tensors, self.times, strict=True) if own is time)


def _by_name(parameters: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are not None, in the order of `parameters`.

    ``parameters.bind`` does the same, but takes longer than all else that is done for a step of a group.
    """
    given = dict(zip(parameters.parameters, args, strict=False)) | kwargs
    if len(given) < len(args) + len(kwargs) or not _REQUIRED <= given.keys() <= parameters.parameters.keys():
        given = dict(parameters.bind(*args, **kwargs).arguments)
    return {name: given[name] for name in parameters.parameters if given.get(name) is not None}


def _leaves(path: tuple[Any, ...], value: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """In pytree's order, and several times as fast: this runs at every step."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _leaves((*path, key), entry)
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from _leaves((*path, index), entry)
    else:
        yield path, value


def _per_latent(timestep: Any, sample: Tensor) -> Tensor:
    if not isinstance(timestep, Tensor):
        dtype = torch.float64 if isinstance(timestep, float) else torch.int64
        timestep = torch.tensor(timestep, dtype=dtype, device=sample.device)
    timesteps: Tensor = timestep.to(sample.device).expand(sample.shape[0])
    return timesteps


def _static(value: Any, batch: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    first = _per_latents(value, batch)
    return value.dtype, value.device, first, value.shape[bool(first) :]


def _per_latents(tensor: Tensor, batch: int) -> int:
    """How many entries `tensor` has for each of `batch` latents (1, or the number of frames); 0: not one for each."""
    count, rest = divmod(len(tensor), batch) if tensor.ndim else (0, 0)
    return 0 if rest else count


class _Recorded(nn.Module):
    """Calls the UNet with tensors at their places in the recorded arguments."""

    def __init__(self, unet: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.unet = unet
        parameters = inspect.signature(unet.forward).parameters.values()
        arguments = {own.name: None for own in parameters if own.default is own.empty} | arguments
        leaves, self._tree = pytree.tree_flatten(arguments)
        self._constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]

    def forward(self, *tensors: Tensor) -> Tensor:
        remaining = iter(tensors)
        leaves = [next(remaining) if constant is None else constant[0] for constant in self._constants]
        arguments = pytree.tree_unflatten(leaves, self._tree)
        # By position, as pipelines pass them: a hook of the user's may look there.
        positional = [arguments.pop(name) for name in ("sample", "timestep")]
        output: Tensor = self.unet(*positional, **arguments, return_dict=False)[0]
        return output


def capture(unet: nn.Module, call: UNetCall, symbolic_batch: bool = True) -> fx.GraphModule:
    """Exports `unet` for the signature of `call`, with a symbolic batch or for the batch of `call` alone.

    The graph shares the UNet's parameters, keeps convolution, normalisation and attention whole, and its inputs are
    `call.tensors` in order, each labelled with its binding time.

    Raises:
        CaptureError: torch.export failed, or the UNet draws random numbers.
    """
    examples, shapes = tuple(tensor.detach().clone() for tensor in call.tensors), None
    if symbolic_batch:
        owned = [_per_latents(tensor, call.batch) == 1 for tensor in call.tensors]
        batch = Dim("batch", min=2, max=_MAX_BATCH)
        shapes = (tuple({0: batch} if own else None for own in owned),)
        examples = tuple(_two_of(tensor) if own else tensor for tensor, own in zip(examples, owned, strict=True))
    try:
        with torch.no_grad():
            program = export(_Recorded(unet, call.arguments), examples, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise CaptureError(
            f"{type(unet).__name__} could not be exported{_place(unet, error)}: {type(error).__name__}: {error}\n"
            f"Load attention processors and adapters that only use tensor operations, or call fdcompile.restore(pipe)."
        ) from error
    if random := [node for node in program.graph.nodes if _draws(node)]:
        raise CaptureError(
            f"{type(unet).__name__} draws random numbers in {module_path(random[0]) or 'its forward'} "
            f"({random[0].target}), and a graph would draw others than it does. "
            f"Switch that off (unet.eval(); tomesd.apply_patch(unet, use_rand=False)), or call fdcompile.restore(pipe)."
        )
    if any(_writes(node) for node in program.graph.nodes):
        program = program.run_decompositions({})  # functional, and otherwise as it was
    module = copy_of(program.module(check_guards=False))
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, name, time in zip(placeholders, call.names, call.times, strict=True):
        node.name = node.target = name
        node.meta["binding_time"] = time
    module.recompile()
    return module


def capture_widest(unet: nn.Module, call: UNetCall, symbolic_batch: bool = True) -> tuple[Signature, fx.GraphModule]:
    """The graph for `call` and any batch, if one can be had; else the graph for its batch. And what calls it serves.

    With `symbolic_batch` false the former is not tried.

    Raises:
        CaptureError: neither can be had.
    """
    if symbolic_batch and call.one_entry_a_latent:
        try:
            return call.signature, capture(unet, call)
        except CaptureError:  # perturbed attention, for one, makes numbers of it
            pass
    return call.fixed_signature, capture(unet, call, symbolic_batch=False)


def _place(unet: nn.Module, error: Exception) -> str:
    """Innermost module of `unet` in the traceback, and the line that it or its attention processor was at."""
    paths = {module: path for path, module in unet.named_modules()}
    own, line = None, ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        inside = isinstance(owner, nn.Module) and owner in paths
        processor = not isinstance(owner, nn.Module) and owner is getattr(own, "processor", unet)
        if inside or processor:
            own = owner if inside else own
            summary = traceback.FrameSummary(frame.f_code.co_filename, number, frame.f_code.co_name)
            line = f"at {summary.line!r} ({summary.filename}, line {number})"
    return f" in {paths[own] or 'its forward'} {line}" if own is not None else ""


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


def _two_of(tensor: Tensor) -> Tensor:
    """A stand-in for `tensor` with a batch of two: export takes one for a constant, and many may exceed the range."""
    return tensor[torch.arange(2, device=tensor.device) % len(tensor)]
