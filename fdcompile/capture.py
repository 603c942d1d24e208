"""UNet call -> one ATen graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.utils import _pytree as pytree

from fdcompile.program import BindingTime, copy_of

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


class CaptureError(RuntimeError):
    """The UNet could not be exported; the message says what to do."""


@dataclass(frozen=True)
class Signature:
    """What makes two UNet calls need different graphs: everything but the tensors' contents and their batch size.

    `leaves` holds the path to each argument, nested ones included, and its value or, of a tensor, its type and shape.
    """

    leaves: tuple[tuple[tuple[Any, ...], Any], ...]


@dataclass(frozen=True)
class UNetCall:
    """One call of the UNet, taken apart.

    Attributes:
        signature: identifies the graph that can answer the call.
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
        arguments = dict(parameters.bind(*args, **kwargs).arguments)
        return_dict = bool(arguments.pop("return_dict", True))
        sample = arguments["sample"]
        timestep = arguments["timestep"]
        arguments["timestep"] = _per_latent(timestep, sample)
        arguments = {name: value for name, value in arguments.items() if value is not None}
        leaves = list(_leaves((), arguments))
        signature = Signature(tuple((path, _static(value)) for path, value in leaves))
        tensors = [(path, value) for path, value in leaves if isinstance(value, Tensor)]
        values = tuple(value for _, value in tensors)
        names = tuple("_".join(map(str, path)) for path, _ in tensors)
        times = tuple(_INPUT_TIMES.get(path[0], BindingTime.PROMPT) for path, _ in tensors)
        return cls(signature, arguments, timestep, values, names, times, sample.shape[0], return_dict)

    def of_time(self, time: BindingTime) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor, own in zip(self.tensors, self.times, strict=True) if own is time)


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


def _static(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.dtype, value.device, tuple(value.shape[1:])


class _Recorded(nn.Module):
    """Calls the UNet with tensors at their places in the recorded arguments."""

    def __init__(self, unet: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.unet = unet
        leaves, self._tree = pytree.tree_flatten(arguments)
        self._constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]

    def forward(self, *tensors: Tensor) -> Tensor:
        remaining = iter(tensors)
        leaves = [next(remaining) if constant is None else constant[0] for constant in self._constants]
        output: Tensor = self.unet(**pytree.tree_unflatten(leaves, self._tree), return_dict=False)[0]
        return output


def capture(unet: nn.Module, call: UNetCall) -> fx.GraphModule:
    """Exports `unet` for the signature of `call`, with a symbolic batch.

    The graph shares the UNet's parameters, keeps convolution, normalisation and attention whole, and its inputs are
    `call.tensors` in order, each labelled with its binding time.

    Raises:
        CaptureError: torch.export failed.
    """
    examples = tuple(_example(tensor, call.batch) for tensor in call.tensors)
    batch = Dim("batch", min=2, max=_MAX_BATCH)
    shapes = tuple({0: batch} if tensor.shape[0] == call.batch else None for tensor in call.tensors)
    try:
        with torch.no_grad():
            program = export(_Recorded(unet, call.arguments), examples, dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        raise CaptureError(
            f"{type(unet).__name__} could not be exported: {type(error).__name__}: {error}\n"
            f"Load attention processors and adapters that only use tensor operations, or call fdcompile.restore(pipe)."
        ) from error
    if any(_writes(node) for node in program.graph.nodes):
        program = program.run_decompositions({})  # functional, and otherwise as it was
    module = copy_of(program.module(check_guards=False))
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, name, time in zip(placeholders, call.names, call.times, strict=True):
        node.name = node.target = name
        node.meta["binding_time"] = time
    module.recompile()
    return module


def structure(unet: nn.Module) -> tuple[Any, ...]:
    """What a captured graph has baked in besides tensors' contents; a change means that it must be captured again.

    Parameters by identity (LoRA layers and ``load_state_dict(assign=True)`` replace them), attention processors, and
    every plain number, flag and string on a module or processor (FreeU, LoRA and IP-Adapter scales).
    """
    baked: list[Any] = []
    for module in unet.modules():
        baked += map(id, module._parameters.values())
        baked.append(_plain(module))
        if (processor := vars(module).get("processor")) is not None:
            baked += [id(processor), _plain(processor)]
    return tuple(baked)


_MACHINERY = vars(nn.Module()).keys() - {"training"}


def _plain(owner: Any) -> tuple[Any, ...]:
    """Names and values of `owner`'s attributes that are constants to a graph, containers of such included."""
    found: list[Any] = []
    for name, value in getattr(owner, "__dict__", {}).items():
        kind = type(value)
        if name in _MACHINERY:
            continue
        if kind in _CONSTANTS:
            found += (name, value)
        elif kind in _CONTAINERS and _is_plain(value):
            found += (name, str(value))
    return tuple(found)


_CONSTANTS = {type(None), bool, int, float, str}
_CONTAINERS = {dict, list, tuple}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return type(value) in _CONSTANTS


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _example(tensor: Tensor, batch: int) -> Tensor:
    """A stand-in for `tensor` with a batch of two: export takes one for a constant, and many may exceed the range."""
    if tensor.shape[0] != batch:
        return tensor.detach().clone()
    return tensor.detach()[:1].expand(2, *tensor.shape[1:]).clone()
