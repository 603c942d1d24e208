"""Decides how a UNet call is answered: by the stock UNet, as a key step, or from the features of its group."""

from __future__ import annotations

from dataclasses import dataclass

from fdcompile.capture.call import UNetCall
from fdcompile.graph.program import BindingTime
from fdcompile.runtime.clock import Position
from fdcompile.runtime.slot import CallSlot


@dataclass(frozen=True)
class Stock:
    """The stock UNet runs, for `reason`."""

    reason: str


@dataclass(frozen=True)
class KeyStep:
    """The encoder runs on the current latents.

    Attributes:
        new_prompt: whether values of the prompt must be computed again.
        continues: whether the features of the previous key step may be used for a forecast.
    """

    new_prompt: bool = False
    continues: bool = True


@dataclass(frozen=True)
class Reuse:
    """The group's features are reused."""


Decision = Stock | KeyStep | Reuse

WRAPPED = "its forward was wrapped before optimize was called, and a wrapper may have any effect: wrap it afterwards"
OTHER_SCHEDULER = "a pipeline with another scheduler made the call: call fdcompile.optimize on that pipeline, too"


def stock_reason(
    position: Position | None,
    unsupported: str | None,
    changed: bool,
    grad_enabled: bool,
    unknown_argument: str | None = None,
) -> str | None:
    """Reason why a call must run the stock UNet; None if a program can answer it.

    Args:
        position: position of the call in the schedule.
        unsupported: ``unsupported_reason`` of the guards.
        changed: whether the UNet has changed since the start of the run.
        grad_enabled: whether gradients are enabled.
        unknown_argument: argument of the call that cannot be guarded (`Signature.unknown`).
    """
    if position is None:
        return "the timestep is not an element of scheduler.timesteps"
    if position.backwards:
        return "the timesteps run backwards, as in an inversion"
    if position.ambiguous:
        return "the scheduler has stepped more than once at a step: several latents may take turns"
    if grad_enabled:
        return "gradients are enabled: run it under torch.no_grad()"
    if unsupported is not None:
        return unsupported
    if changed:
        return "a module, an adapter or an attention processor was changed during the run"
    if unknown_argument is not None:
        return f"{unknown_argument}: an object that may change or differ between calls"
    return None


def decide(call: UNetCall, step: int, slot: CallSlot, controlnet_followed: bool) -> KeyStep | Reuse:
    """Decides between a key step and reuse of the features of `slot`'s group.

    Residuals of a followed ControlNet change with the latents; changes of its conditioning were detected at its own
    call. All other residuals, and the channels next to the latents, must be equal to those of the group.
    """
    same_channels = slot.channels is None or slot.channels.same_as(call.sample)  # compares with the last call
    if not slot.conditioning.same_as(call.of_time(BindingTime.PROMPT)):
        return KeyStep(new_prompt=True, continues=False)
    if not same_channels:
        return KeyStep(continues=False)
    residuals = call.of_time(BindingTime.KEY)
    if residuals and not controlnet_followed and not slot.residuals.same_as(residuals):
        return KeyStep(continues=False)
    group = slot.group
    return Reuse() if group is not None and group.start <= step < group.stop else KeyStep()
