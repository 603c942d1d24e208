"""Which ControlNet calls of a run need not be made, and where their residuals belong when they were not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fdcompile.capture.call import UNetCall
from fdcompile.graph.program import BindingTime
from fdcompile.runtime.clock import Position
from fdcompile.runtime.conditioning import Conditioning

_NAMES = ("sample", "timestep", "encoder_hidden_states", "controlnet_cond")


@dataclass
class _Executed:
    """A call that was made; `padded` as `_is_padded` says of the last key step."""

    conditioning: Conditioning
    constants: tuple[Any, ...]
    output: Any
    padded: bool | None = None


@dataclass(frozen=True)
class ControlNetCall:
    """A ControlNet call, taken apart.

    Attributes:
        forward: makes the call.
        timestep: as the pipeline passed it.
        tensors: all tensor arguments but the latents and the timestep.
        constants: everything else that the residuals depend on, apart from the latents' values.
    """

    forward: Callable[[], Any]
    timestep: Any
    tensors: tuple[Tensor, ...]
    constants: tuple[Any, ...]

    @classmethod
    def parse(cls, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> ControlNetCall:
        arguments = dict(zip(_NAMES, args, strict=False)) | kwargs
        timestep, sample = arguments.pop("timestep", None), arguments.pop("sample", None)
        if added := arguments.get("added_cond_kwargs"):  # perturbed attention puts the UNet's image prompt there, late
            arguments["added_cond_kwargs"] = {key: added[key] for key in added if key != "image_embeds"}
        leaves = pytree.tree_leaves(arguments)
        latents = (sample.shape, sample.dtype) if isinstance(sample, Tensor) else (None, None)
        return cls(
            forward=lambda: forward(*args, **kwargs),
            timestep=timestep if isinstance(sample, Tensor) else None,
            tensors=tuple(leaf for leaf in leaves if isinstance(leaf, Tensor)),
            constants=(*latents, *(leaf for leaf in leaves if not isinstance(leaf, Tensor))),
        )


class ControlNetCalls:
    """Answers a run's ControlNet calls at non-key steps with the residuals of the group's key step.

    A step may still turn out to be a key step when the UNet is called, because its conditioning has changed. Then the
    residuals are computed after all (`complete`). They can be put where they belong if a key step has shown that the
    UNet is given the ControlNet's residuals as they are or, in guess mode, after zeros for the unconditional half.
    Where neither is so nothing is skipped.
    """

    def __init__(self) -> None:
        self._executed: dict[int, _Executed] = {}
        self._position: Position | None = None
        self._skipped: Callable[[], Any] | None = None

    def changed(self, call: ControlNetCall, position: Position) -> bool:
        """Whether `call` differs from the last executed one of its slot in more than the latents."""
        last = self._executed.get(position.slot)
        return last is None or last.constants != call.constants or not last.conditioning.same_as(call.tensors)

    def may_skip(self, position: Position) -> bool:
        """Whether a key step has shown where the UNet is given the residuals."""
        return self._executed[position.slot].padded is not None

    def skip(self, call: ControlNetCall, position: Position) -> Any:
        """The residuals of the last executed call."""
        self._position, self._skipped = position, call.forward
        return self._executed[position.slot].output

    def execute(self, call: ControlNetCall, position: Position) -> Any:
        output = call.forward()
        last = self._executed.get(position.slot)
        padded = last.padded if last is not None else None
        self._executed[position.slot] = _Executed(Conditioning(call.tensors), call.constants, output, padded)
        self._position, self._skipped = position, None
        return output

    def follows(self, position: Position) -> bool:
        """Whether a ControlNet was called at `position`, so that a change of its conditioning would have been seen."""
        return self._position == position

    def complete(self, call: UNetCall, position: Position) -> tuple[UNetCall, bool]:
        """The UNet call of a key step, with the residuals of its own latents, and whether they were computed late."""
        last = self._executed.get(position.slot)
        if last is None or not self.follows(position):
            return call, False
        if self._skipped is None:
            last.padded = _is_padded(_residuals(last.output), call.of_time(BindingTime.KEY))
            return call, False
        last.output, self._skipped = self._skipped(), None
        residuals = iter(_residuals(last.output))
        tensors = [
            (_pad(next(residuals)) if last.padded else next(residuals)) if time is BindingTime.KEY else tensor
            for tensor, time in zip(call.tensors, call.signature.times, strict=True)
        ]
        return replace(call, tensors=tuple(tensors)), True

    def clear(self) -> None:
        self._executed.clear()
        self._position = self._skipped = None


def _residuals(output: Any) -> list[Tensor]:
    """In the order of the UNet's arguments: those of the down blocks, then that of the bottleneck."""
    leaves = pytree.tree_leaves(output if isinstance(output, tuple) else output.to_tuple())
    return [leaf for leaf in leaves if leaf is not None]


def _pad(residual: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(residual), residual])


def _is_padded(computed: list[Tensor], given: tuple[Tensor, ...]) -> bool | None:
    """Whether the UNet was given the `computed` residuals after as many zeros; None: it was given something else."""
    if len(computed) != len(given):
        return None
    pairs = list(zip(computed, given, strict=True))
    if all(one is other for one, other in pairs):
        return False
    if all(other.shape[0] == 2 * one.shape[0] and torch.equal(_pad(one), other) for one, other in pairs):
        return True
    return None
