"""How a UNet call is answered: by the stock UNet, as a key step, or from the features of the group it is in."""

from __future__ import annotations

from dataclasses import dataclass

from fdcompile.capture.call import UNetCall
from fdcompile.graph.program import BindingTime
from fdcompile.runtime.clock import Position
from fdcompile.runtime.slot import CallSlot


@dataclass(frozen=True)
class Stock:
    """The stock UNet runs, because of `reason`."""

    reason: str


@dataclass(frozen=True)
class KeyStep:
    """The encoder runs on the current latents.

    Attributes:
        new_prompt: what follows from the prompt is computed anew.
        continues: the features of the key step before may still be used for a forecast.
    """

    new_prompt: bool = False
    continues: bool = True


@dataclass(frozen=True)
class Reuse:
    """The group's features are reused."""


Decision = Stock | KeyStep | Reuse

WRAPPED = "its forward was wrapped before it was optimised, and a wrapper may do anything: wrap it afterwards"
OTHER_SCHEDULER = "a pipeline with another scheduler made the call: call fdcompile.optimize on that pipeline, too"


def stock_reason(
    position: Position | None,
    unsupported: str | None,
    changed: bool,
    grad_enabled: bool,
    unknown_argument: str | None = None,
) -> str | None:
    """Why a call cannot be answered from a program, or None if it can.

    Args:
        position: where the call stands in the schedule.
        unsupported: the guards' reason why no graph can stand in for the UNet.
        changed: whether the UNet is another than at the start of the run.
        grad_enabled: whether gradients are recorded.
        unknown_argument: the argument of the call that no guard can be made for (`Signature.unknown`).
    """
    if position is None:
        return "the timestep is no element of scheduler.timesteps"
    if position.backwards:
        return "the schedule is walked backwards, as an inversion does"
    if position.ambiguous:
        return "the scheduler has stepped more than once at a step: several latents may take turns"
    if grad_enabled:
        return "gradients are enabled: run it under torch.no_grad()"
    if unsupported is not None:
        return unsupported
    if changed:
        return "a module, an adapter or an attention processor was changed during the run"
    if unknown_argument is not None:
        return f"{unknown_argument}: an object that may change, or be another each time"
    return None


def decide(call: UNetCall, step: int, slot: CallSlot, controlnet_followed: bool) -> KeyStep | Reuse:
    """Whether `call` may be answered from the group of its `slot`.

    Residuals of a ControlNet that is followed move with the latents, and it has said if they have another reason to.
    Any others must be equal to those of the group, and so must channels beside the latents.
    """
    same_channels = slot.channels is None or slot.channels.same_as(call.sample)  # it compares with the call before
    if not slot.conditioning.same_as(call.of_time(BindingTime.PROMPT)):
        return KeyStep(new_prompt=True, continues=False)
    if not same_channels:
        return KeyStep(continues=False)
    residuals = call.of_time(BindingTime.KEY)
    if residuals and not controlnet_followed and not slot.residuals.same_as(residuals):
        return KeyStep(continues=False)
    group = slot.group
    return Reuse() if group is not None and group.start <= step < group.stop else KeyStep()
