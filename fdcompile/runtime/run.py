"""State of one pass of a sampler through its schedule."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fdcompile.capture.call import UNetCall
from fdcompile.runtime.caller import Caller
from fdcompile.runtime.clock import Position
from fdcompile.runtime.controlnet import ControlNetCall, ControlNetCalls
from fdcompile.runtime.forecast import Forecaster
from fdcompile.runtime.interface import UNetInterface
from fdcompile.runtime.record import RunRecord
from fdcompile.runtime.runner import ProgramRunner, Tensors
from fdcompile.runtime.runner_cache import RunnerCache
from fdcompile.runtime.slot import CallSlot, CallSlots


@dataclass
class Run:
    """State of one run.

    Attributes:
        generation: see `Position`.
        timesteps: the whole schedule, shape ``[steps]``, on the device.
        key_steps: planned key steps, as indices into `timesteps`.
        epoch: epoch of the guards at the start of the run.
        caller: the pipeline that makes the calls.
        breaks: unplanned key steps of the previous run, if it had the same steps.
        last_call: the last UNet call, which speeds up parsing of the next.
    """

    generation: int
    timesteps: Tensor
    key_steps: tuple[int, ...]
    epoch: int
    caller: Caller
    record: RunRecord
    breaks: Sequence[int] = ()
    slots: CallSlots = field(default_factory=CallSlots)
    controlnets: ControlNetCalls = field(default_factory=ControlNetCalls)
    last_call: UNetCall | None = None
    last_step: int = -1

    @classmethod
    def begin(
        cls,
        position: Position,
        timesteps: Tensor,
        caller: Caller,
        forecaster: Forecaster,
        runner_cache: RunnerCache,
        ranks: int,
        last: RunRecord | None,
    ) -> Run:
        """Begins the run whose first call is at `position`. `last` is the record of the previous run.

        Raises:
            PackageError: see `RunnerCache.follow_unet`.
        """
        rest, announced = len(timesteps) - position.start, caller.announced_steps
        num_steps = announced if announced is not None and 0 < announced < rest else rest
        caller.read_ahead(timesteps)
        key_steps = forecaster.begin_run(caller, timesteps, position.start, num_steps)
        forecaster.warn_of_few_steps(num_steps)
        runner_cache.begin_run()
        alike = last is not None and (last.start, last.num_steps) == (position.start, num_steps)
        breaks = sorted(set(last.forced)) if last is not None and alike else []
        record = RunRecord(position.start, num_steps, runner_cache, ranks, forecaster.plan_notes)
        epoch = runner_cache.graph_cache.guards.epoch
        return cls(position.generation, timesteps, key_steps, epoch, caller, record, breaks)

    @property
    def stop(self) -> int:
        """Index after that of the last step."""
        return self.record.start + self.record.num_steps

    @property
    def finished(self) -> bool:
        """Whether the last step has begun."""
        return self.last_step + 1 >= self.stop

    def end_of_group(self, step: int) -> int:
        """The planned end of a group that begins at `step`."""
        index = bisect.bisect_right(self.key_steps, step)
        return self.key_steps[index] if index < len(self.key_steps) else max(self.stop, step + 1)

    def decode_until(self, step: int, stop: int) -> int:
        """End of the steps from `step` on, at most `stop`, that are decoded together.

        It is the next unplanned key step of the previous run (``control_guidance_end``), which is likely to recur.
        """
        following = bisect.bisect_right(self.breaks, step)
        return min([stop, *self.breaks[following : following + 1]])

    def slot(self, call: UNetCall, position: Position, runner: ProgramRunner, interface: UNetInterface) -> CallSlot:
        """Slot of `call`, made if there is none for `runner`."""
        key = self.slots.key_of(call, position, runner)
        if key not in self.slots or not self.slots[key].answers(call, runner):
            schedule = self._schedule(call, position, runner)
            self.slots[key] = CallSlot(runner, call.batch, schedule, interface.fixed_channels(call.sample))
        self.slots.mark(key, call, position)
        return self.slots[key]

    def _schedule(self, call: UNetCall, position: Position, runner: ProgramRunner) -> Tensors:
        """Values of the schedule, from another slot at this step or from `runner`, which checks that they hold."""
        at_this_step = (slot for slot in self.slots.values() if slot.step == position.step)
        known = (slot.schedule for slot in at_this_step if slot.answers(call, runner))
        return next(known, None) or runner.schedule(call, self.timesteps, self.caller.values(self.timesteps))

    def controlnet_called(self, call: ControlNetCall, position: Position, reuse: bool) -> Any:
        """Answers a call of a ControlNet; with the key step's residuals if the UNet will `reuse` its features."""
        if self.controlnets.changed(call, position):
            if slot := self.slots.get(position.slot):
                slot.forget()  # the UNet's call is a key step
        elif reuse and self.controlnets.may_skip(position):
            return self.controlnets.skip(call, position)
        self.record.controlnet_runs += 1
        return self.controlnets.execute(call, position)

    def will_reuse(self, position: Position) -> bool:
        """Whether a UNet call at `position` can be answered from the features of a group."""
        slot = self.slots.get(position.slot)
        return slot is not None and slot.group is not None and slot.group.start < position.step < slot.group.stop

    def skip(self, position: Position) -> None:
        """Records that the stock UNet answered the call at `position`, which leaves no key step to forecast from."""
        self.last_step, self.last_call = position.step, None
        if slot := self.slots.get(position.slot):
            slot.last_key, slot.step = None, position.step
        self.release_if_over()

    def release_if_over(self) -> None:
        """Drops all tensors of the run once all calls of the last step are answered."""
        if self.finished and all(slot.step == self.last_step for slot in self.slots.values()):
            self.slots.clear()
            self.controlnets.clear()
            self.last_call = None
