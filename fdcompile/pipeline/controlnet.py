"""Do not run the ControlNet where its residuals would not be read."""

from __future__ import annotations

import functools
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
from fdcompile.runtime.executor import Executor


@dataclass
class _Ran:
    """A real run of a ControlNet; `padded` as `_is_padded` says of the last key step."""

    conditioning: Conditioning
    constants: tuple[Any, ...]
    output: Any
    padded: bool | None = None


class ControlNets:
    """Answers calls of a session's ControlNets at non-key steps with the residuals of the group's key step.

    A step may still turn out to be a key step when the UNet is called, because its conditioning has changed. Then the
    executor asks for the residuals after all (`complete`). They can be put where they belong if a key step has shown
    that the UNet is given the ControlNet's residuals as they are or, in guess mode, after zeros for the unconditional
    half. Where neither is so nothing is skipped.

    Attributes:
        runs: how often a ControlNet ran since this was last set to 0.
    """

    executor: Executor

    def __init__(self) -> None:
        self.runs = 0
        self._generation: int | None = None
        self._ran: dict[int, _Ran] = {}
        self._position: Position | None = None
        self._skipped: Callable[[], Any] | None = None

    def knows(self, timestep: Any) -> bool:
        """Whether `timestep` is of the session's schedule."""
        return self.executor.clock.preview(timestep) is not None

    def __call__(
        self, forward: Callable[..., Any], wrapped: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Answers a call of a ControlNet."""
        run = functools.partial(self._run, forward, args, kwargs)
        names = ("sample", "timestep", "encoder_hidden_states", "controlnet_cond")
        arguments = dict(zip(names, args, strict=False)) | kwargs
        position = self.executor.clock.preview(arguments.pop("timestep", None))
        sample = arguments.pop("sample", None)
        if position is None or sample is None:
            return run()
        if position.generation != self._generation:
            self._generation = position.generation
            self._ran.clear()
        self._position = position
        if added := arguments.get("added_cond_kwargs"):  # perturbed attention puts the UNet's image prompt there, late
            arguments["added_cond_kwargs"] = {key: added[key] for key in added if key != "image_embeds"}
        leaves = pytree.tree_leaves(arguments)
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        constants = (sample.shape, sample.dtype, *(leaf for leaf in leaves if not isinstance(leaf, Tensor)))
        last = self._ran.get(position.lane)
        if last is not None and last.constants == constants and last.conditioning.same_as(tensors):
            if last.padded is not None and self.executor.reuses(position):
                self._skipped = run
                return last.output
        else:
            self.executor.end_group(position)
        output = run()
        padded = last.padded if last is not None else None
        self._ran[position.lane] = _Ran(Conditioning(tensors), constants, output, padded)
        return output

    def follows(self, position: Position) -> bool:
        """Whether a ControlNet was called at `position`, so that a change of its conditioning would have been seen."""
        return self._position == position

    def complete(self, call: UNetCall, position: Position) -> UNetCall:
        """The UNet call of a key step, with the residuals of its own latent."""
        last = self._ran.get(position.lane)
        if last is None or not self.follows(position):
            return call
        if self._skipped is None:
            last.padded = _is_padded(_residuals(last.output), call.of_time(BindingTime.KEY))
            return call
        last.output = self._skipped()
        fresh = iter(_residuals(last.output))
        tensors = [
            (_pad(next(fresh)) if last.padded else next(fresh)) if time is BindingTime.KEY else tensor
            for tensor, time in zip(call.tensors, call.signature.times, strict=True)
        ]
        return replace(call, tensors=tuple(tensors))

    def _run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._skipped = None
        self.runs += 1
        return forward(*args, **kwargs)


def _residuals(output: Any) -> list[Tensor]:
    """In the order of the UNet's arguments: those of the down blocks, then that of the bottleneck."""
    leaves = pytree.tree_leaves(output if isinstance(output, tuple) else output.to_tuple())
    return [leaf for leaf in leaves if leaf is not None]


def _pad(residual: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(residual), residual])


def _is_padded(made: list[Tensor], given: tuple[Tensor, ...]) -> bool | None:
    """Whether the UNet was given what the ControlNet made after as many zeros; None: it was given something else."""
    if len(made) != len(given):
        return None
    pairs = list(zip(made, given, strict=True))
    if all(own is other for own, other in pairs):
        return False
    if all(other.shape[0] == 2 * own.shape[0] and torch.equal(_pad(own), other) for own, other in pairs):
        return True
    return None
