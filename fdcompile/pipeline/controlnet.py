"""Do not run the ControlNet where its residuals would not be read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.hooks.hooks import ModelHook
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fdcompile.capture.call import UNetCall
from fdcompile.graph.program import BindingTime
from fdcompile.runtime.conditioning import Conditioning
from fdcompile.runtime.executor import Executor


@dataclass
class _Ran:
    """A real run of the ControlNet; `padded` as `_is_padded` says of the last key step."""

    conditioning: Conditioning
    constants: tuple[Any, ...]
    output: Any
    padded: bool | None = None


class ControlNetHook(ModelHook):  # type: ignore[misc]  # diffusers is untyped
    """Answers calls at non-key steps with the residuals of the group's key step: the UNet does not read them there.

    A step may still turn out to be a key step when the UNet is called, because its conditioning has changed. Then the
    executor asks for the residuals after all (`complete`). They can be put where they belong if a key step has shown
    that the UNet is given the ControlNet's residuals as they are or, in guess mode, after zeros for the unconditional
    half. Where neither is so nothing is skipped.
    """

    def __init__(self, executor: Executor) -> None:
        super().__init__()
        self._executor = executor
        self._generation: int | None = None
        self._ran: dict[int, _Ran] = {}
        self._skipped: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the ControlNet's forward."""
        names = ("sample", "timestep", "encoder_hidden_states", "controlnet_cond")
        arguments = dict(zip(names, args, strict=False)) | kwargs
        sample, timestep = arguments.pop("sample"), arguments.pop("timestep")
        position = self._executor.clock.preview(timestep)
        if position is None:
            return self._run(args, kwargs)
        if position.generation != self._generation:
            self._generation = position.generation
            self._ran.clear()
        if added := arguments.get("added_cond_kwargs"):  # perturbed attention puts the UNet's image prompt there, late
            arguments["added_cond_kwargs"] = {key: added[key] for key in added if key != "image_embeds"}
        leaves = pytree.tree_leaves(arguments)
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        constants = (sample.shape, sample.dtype, *(leaf for leaf in leaves if not isinstance(leaf, Tensor)))
        last = self._ran.get(position.lane)
        if last is not None and last.constants == constants and last.conditioning.same_as(tensors):
            if last.padded is not None and self._executor.reuses(position):
                self._skipped = args, kwargs
                return last.output
        else:
            self._executor.end_group(position)
        output = self._run(args, kwargs)
        padded = last.padded if last is not None else None
        self._ran[position.lane] = _Ran(Conditioning(tensors), constants, output, padded)
        return output

    def complete(self, call: UNetCall, lane: int) -> UNetCall:
        """The UNet call of a key step, with the residuals of its own latent."""
        last = self._ran.get(lane)
        if last is None:
            return call
        if self._skipped is None:
            last.padded = _is_padded(_residuals(last.output), call.of_time(BindingTime.KEY))
            return call
        last.output = self._run(*self._skipped)
        fresh = iter(_residuals(last.output))
        tensors = [
            (_pad(next(fresh)) if last.padded else next(fresh)) if time is BindingTime.KEY else tensor
            for tensor, time in zip(call.tensors, call.times, strict=True)
        ]
        return replace(call, tensors=tuple(tensors))

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._skipped = None
        self._executor.controlnet_runs += 1
        assert self.fn_ref.original_forward is not None
        return self.fn_ref.original_forward(*args, **kwargs)


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
