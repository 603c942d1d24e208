"""Skips ControlNet calls at non-key steps, and makes them late where a step becomes a key step."""

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
    """An executed call; `padded` is the result of `_is_padded` at the last key step."""

    conditioning: Conditioning
    constants: tuple[Any, ...]
    output: Any
    padded: bool | None = None


@dataclass(frozen=True)
class ControlNetCall:
    """A parsed ControlNet call.

    Attributes:
        forward: runs the ControlNet with the arguments of the call.
        timestep: as passed by the pipeline.
        tensors: all tensor arguments except the latents and the timestep.
        constants: the other arguments, with the shape and type of the latents.
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

    If the conditioning of the UNet's call turns out to have changed, the step becomes a key step after all, and
    `complete` computes the skipped residuals and inserts them into the UNet's arguments. This requires that a key step
    has shown how the pipeline passes them on: unchanged or, in guess mode, after zeros for the unconditional half.
    Calls of other pipelines are not skipped.
    """

    def __init__(self) -> None:
        self._executed: dict[int, _Executed] = {}
        self._position: Position | None = None
        self._skipped: Callable[[], Any] | None = None

    def changed(self, call: ControlNetCall, position: Position) -> bool:
        """Whether `call` differs from the last executed call of its slot in more than the latents."""
        last = self._executed.get(position.slot)
        return last is None or last.constants != call.constants or not last.conditioning.same_as(call.tensors)

    def may_skip(self, position: Position) -> bool:
        """Whether a key step has shown how the residuals are passed to the UNet."""
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
        """Whether a ControlNet was called at `position`, so that `changed` has compared its conditioning."""
        return self._position == position

    def complete(self, call: UNetCall, position: Position) -> tuple[UNetCall, bool]:
        """The UNet call of a key step with the residuals of its own latents, and whether those were computed here."""
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
    """Residuals of the down blocks, then that of the bottleneck: the order of the UNet's arguments."""
    leaves = pytree.tree_leaves(output if isinstance(output, tuple) else output.to_tuple())
    return [leaf for leaf in leaves if leaf is not None]


def _pad(residual: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(residual), residual])


def _is_padded(computed: list[Tensor], given: tuple[Tensor, ...]) -> bool | None:
    """Whether `given` are the `computed` residuals after as many zeros (True), unchanged (False), or neither (None)."""
    if len(computed) != len(given):
        return None
    pairs = list(zip(computed, given, strict=True))
    if all(one is other for one, other in pairs):
        return False
    if all(other.shape[0] == 2 * one.shape[0] and torch.equal(_pad(one), other) for one, other in pairs):
        return True
    return None
