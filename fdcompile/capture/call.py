"""A parsed UNet call: its signature, and the binding times of its tensors."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fdcompile.graph.program import BindingTime

_INPUT_TIMES = {
    "sample": BindingTime.LATENT,
    "timestep": BindingTime.SCHEDULE,
    # Residuals of a ControlNet or T2I-Adapter follow the latent; they are read at key steps.
    "down_block_additional_residuals": BindingTime.KEY,
    "mid_block_additional_residual": BindingTime.KEY,
    "down_intrablock_additional_residuals": BindingTime.KEY,
}
"""Binding time of each UNet argument; any other tensor (text, class, added conditions, masks) is known per prompt."""

_REQUIRED = {"sample", "timestep"}

_IMMUTABLE = (type(None), bool, int, float, complex, str, bytes, tuple, torch.dtype, torch.device, enum.Enum)
"""Types that a signature compares by value. Tensor arguments are described by tuples."""


_TENSORS = (Tensor, torch.nn.Parameter)

_Leaf = tuple[tuple[Any, ...], Any]


@dataclass(frozen=True)
class Signature:
    """Key of the graph of a UNet call: everything but the contents of tensors.

    Attributes:
        leaves: path and value of each argument, including nested ones. Tensors are described by type and shape without
            the batch.
        batch: number of latents, if the graph has a fixed batch size; None for any.
        environment: other settings that results depend on: autocast, and a default type other than float32.
    """

    leaves: tuple[_Leaf, ...]
    batch: int | None = None
    environment: tuple[Any, ...] = ()

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # looked up at every step
        return hash((self.leaves, self.batch, self.environment))

    @cached_property
    def unknown(self) -> str | None:
        """The first argument of a mutable type, which no graph can be specialized to; None if there is none."""
        for path, value in self.leaves:
            if not isinstance(value, _IMMUTABLE):
                kind = value if isinstance(value, type) else type(value)
                return f"{'.'.join(map(str, path))}, a {kind.__name__}"
        return None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Name of each tensor: that of the argument, or the path to a nested tensor."""
        return tuple("_".join(map(str, path)) for path, value in self.leaves if isinstance(value, tuple))

    @cached_property
    def places(self) -> dict[BindingTime, tuple[int, ...]]:
        """Indices of the tensors by binding time."""
        return {time: tuple(i for i, other in enumerate(self.times) if other is time) for time in set(self.times)}

    @cached_property
    def times(self) -> tuple[BindingTime, ...]:
        """Binding time of each tensor."""
        paths = (path for path, value in self.leaves if isinstance(value, tuple))
        return tuple(_INPUT_TIMES.get(path[0], BindingTime.PROMPT) for path in paths)


@dataclass(frozen=True)
class UNetCall:
    """One parsed call of the UNet.

    Attributes:
        signature: key of a graph for any batch size.
        leaves: path and value of each argument, including nested ones.
        arguments: arguments by name, without those that are None; the timestep has shape ``[batch]``.
        timestep: timestep as passed by the caller.
        tensors: all tensor arguments, in the order of the graph's inputs; the timestep has shape ``[batch]``.
        batch: number of latents.
        return_dict: whether the caller expects an output object.
    """

    signature: Signature
    leaves: list[_Leaf]
    arguments: dict[str, Any]
    timestep: Any
    tensors: tuple[Tensor, ...]
    batch: int
    return_dict: bool

    @classmethod
    def parse(
        cls, parameters: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], last: UNetCall | None = None
    ) -> UNetCall:
        """Parses a call of a forward that has `parameters`; faster if it resembles the `last` one.

        Raises:
            TypeError: the arguments do not fit.
        """
        arguments = _by_name(parameters, args, kwargs)
        return_dict = bool(arguments.pop("return_dict", True))
        sample = arguments["sample"]
        timestep = arguments["timestep"]
        arguments["timestep"] = _per_latent(timestep, sample)
        leaves = list(_leaves((), arguments))
        environment = _environment(sample.device.type)
        if last is not None and last.signature.environment == environment and last._described_by(leaves):
            signature = last.signature
        else:
            described = tuple((path, _static(value, len(sample))) for path, value in leaves)
            signature = Signature(described, environment=environment)
        tensors = tuple(value for _, value in leaves if isinstance(value, Tensor))
        return cls(signature, leaves, arguments, timestep, tensors, len(sample), return_dict)

    def _described_by(self, leaves: list[_Leaf]) -> bool:
        """Whether a quick comparison shows that a call with `leaves` has the same signature."""
        return len(leaves) == len(self.leaves) and all(
            path == before and (value is known or (path[0] in _REQUIRED and _alike(value, known)))
            for (path, value), (before, known) in zip(leaves, self.leaves, strict=True)
        )

    @cached_property
    def fixed_signature(self) -> Signature:
        """Key of a graph for the batch size of this call."""
        return replace(self.signature, batch=self.batch)

    @property
    def sample(self) -> Tensor:
        """The latents, shape ``[batch, channels, ...]``."""
        latents: Tensor = self.arguments["sample"]
        return latents

    @property
    def one_entry_a_latent(self) -> bool:
        """Whether the batch of all tensors has one entry per latent; videos fold frames into it, or unfold them."""
        counts = [per_latents(tensor, self.batch) for tensor in self.tensors]
        return max(counts) == 1 and self.sample.ndim == 4

    def of_time(self, time: BindingTime) -> tuple[Tensor, ...]:
        return tuple(self.tensors[place] for place in self.signature.places.get(time, ()))


def _environment(device: str) -> tuple[Any, ...]:
    settings: tuple[Any, ...] = ()
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # not on the meta device
        settings = ("autocast", torch.get_autocast_dtype(device))
    default = torch.get_default_dtype()
    return settings if default is torch.float32 else (*settings, "default", default)


def _by_name(parameters: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are not None, in the order of `parameters`.

    ``parameters.bind`` does the same, but takes longer than everything else at a step of a group.
    """
    names = parameters.parameters
    given = dict(zip(names, args, strict=False)) | kwargs
    if len(given) < len(args) + len(kwargs) or not _REQUIRED <= given.keys() <= names.keys():
        given = dict(parameters.bind(*args, **kwargs).arguments)
    return {name: value for name in names if (value := given.get(name)) is not None}


def _leaves(path: tuple[Any, ...], value: Any) -> Iterator[_Leaf]:
    """Yields path and value of each leaf, in the order of pytree but faster, because this runs at every step."""
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
    if type(value) not in _TENSORS:  # subclasses may have any behavior
        return type(value)
    first = per_latents(value, batch)
    return value.dtype, value.device, first, value.shape[bool(first) :]


def _alike(one: Tensor, other: Tensor) -> bool:
    return (
        type(one) is type(other)
        and one.shape == other.shape
        and one.dtype is other.dtype
        and one.device == other.device
    )


def per_latents(tensor: Tensor, batch: int) -> int:
    """Entries of `tensor` for each of `batch` latents (1, or the number of frames); 0 if they do not divide."""
    count, rest = divmod(len(tensor), batch) if tensor.ndim else (0, 0)
    return 0 if rest else count
