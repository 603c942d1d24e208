"""One pass of a sampler through its schedule, and everything that is remembered between its UNet calls."""

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
from fdcompile.runtime.forecast import Forecast
from fdcompile.runtime.interface import UNetInterface
from fdcompile.runtime.record import RunRecord
from fdcompile.runtime.runner import ProgramRunner, Tensors
from fdcompile.runtime.runner_cache import RunnerCache
from fdcompile.runtime.slot import CallSlot, CallSlots


@dataclass
class Run:
    """State that dies with the run.

    Attributes:
        generation: see `Position`.
        timesteps: the whole schedule, shape ``[steps]``, on the device.
        key_steps: planned ones, as indices into `timesteps`.
        epoch: of the guards, for which the graphs that answer its calls were captured.
        caller: the pipeline that makes its calls.
        breaks: steps at which the run before, if it was like this one, needed new features that were not planned.
        last_call: the last UNet call, which the next one is likely to resemble.
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
        forecast: Forecast,
        runner_cache: RunnerCache,
        ranks: int,
        last: RunRecord | None,
    ) -> Run:
        """The run whose first call is at `position`. `last` is the record of the one before.

        Raises:
            PackageError: see `RunnerCache.follow_unet`.
        """
        rest, announced = len(timesteps) - position.start, caller.announced_steps
        num_steps = announced if announced is not None and 0 < announced < rest else rest
        caller.read_ahead(timesteps)
        key_steps = forecast.begin_run(caller, timesteps, position.start, num_steps)
        forecast.warn_of_few_steps(num_steps)
        runner_cache.begin_run()
        alike = last is not None and (last.start, last.num_steps) == (position.start, num_steps)
        breaks = sorted(set(last.forced)) if last is not None and alike else []
        record = RunRecord(position.start, num_steps, runner_cache, ranks, forecast.plan_notes)
        epoch = runner_cache.graph_cache.guards.epoch
        return cls(position.generation, timesteps, key_steps, epoch, caller, record, breaks)

    @property
    def stop(self) -> int:
        """The step after its last one."""
        return self.record.start + self.record.num_steps

    @property
    def finished(self) -> bool:
        """Whether its last step has begun."""
        return self.last_step + 1 >= self.stop

    def end_of_group(self, step: int) -> int:
        """The planned end of a group that begins at `step`."""
        index = bisect.bisect_right(self.key_steps, step)
        return self.key_steps[index] if index < len(self.key_steps) else max(self.stop, step + 1)

    def decode_until(self, step: int, stop: int) -> int:
        """Where to stop decoding the steps from `step` to `stop` - 1 together.

        A step at which the run before turned out to need new features (``control_guidance_end``) probably does again.
        """
        following = bisect.bisect_right(self.breaks, step)
        return min([stop, *self.breaks[following : following + 1]])

    def slot(self, call: UNetCall, position: Position, runner: ProgramRunner, interface: UNetInterface) -> CallSlot:
        """The slot that `call` belongs to, which `runner` answers."""
        key = self.slots.key_of(call, position, runner)
        if key not in self.slots or not self.slots[key].answers(call, runner):
            schedule = self._schedule(call, position, runner)
            self.slots[key] = CallSlot(runner, call.batch, schedule, interface.fixed_channels(call.sample))
        self.slots.mark(key, call, position)
        return self.slots[key]

    def _schedule(self, call: UNetCall, position: Position, runner: ProgramRunner) -> Tensors:
        """As another slot of this step has it, or checked against the weights and timesteps there are now."""
        at_this_step = (slot for slot in self.slots.values() if slot.step == position.step)
        known = (slot.schedule for slot in at_this_step if slot.answers(call, runner))
        return next(known, None) or runner.schedule(call, self.timesteps, self.caller.values(self.timesteps))

    def controlnet_called(self, call: ControlNetCall, position: Position, reuse: bool) -> Any:
        """Answers a call of a ControlNet: from the key step if the UNet's call will `reuse` its features."""
        if self.controlnets.changed(call, position):
            if slot := self.slots.get(position.slot):
                slot.forget()  # the UNet's call is a key step
        elif reuse and self.controlnets.may_skip(position):
            return self.controlnets.skip(call, position)
        self.record.controlnet_runs += 1
        return self.controlnets.execute(call, position)

    def will_reuse(self, position: Position) -> bool:
        """Whether the UNet's next call, if it is made at `position`, can be answered from a group's features."""
        slot = self.slots.get(position.slot)
        return slot is not None and slot.group is not None and slot.group.start < position.step < slot.group.stop

    def skip(self, position: Position) -> None:
        """Notes that the stock UNet answered the call at `position`: there is no key step to forecast from."""
        self.last_step, self.last_call = position.step, None
        if slot := self.slots.get(position.slot):
            slot.last_key, slot.step = None, position.step
        self.release_if_over()

    def release_if_over(self) -> None:
        """Once all calls of the last step are answered, drops what only they needed: no tensor outlives the run."""
        if self.finished and all(slot.step == self.last_step for slot in self.slots.values()):
            self.slots.clear()
            self.controlnets.clear()
            self.last_call = None
