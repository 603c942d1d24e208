"""Answers UNet calls from the staged program: encoder at key steps, decoders of a group together."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from fdcompile.capture.call import UNetCall
from fdcompile.capture.export import StatefulError
from fdcompile.capture.guards import Guards
from fdcompile.config import Config
from fdcompile.key_steps import few_steps_warning
from fdcompile.runtime.clock import Clock, Position
from fdcompile.runtime.controlnet import ControlNetCall
from fdcompile.runtime.events import Called
from fdcompile.runtime.forecast import Forecast
from fdcompile.runtime.interface import UNetInterface
from fdcompile.runtime.policy import KeyStep, Reuse, Stock, decide, stock_reason
from fdcompile.runtime.ranks import Ranks
from fdcompile.runtime.record import RunRecord
from fdcompile.runtime.run import Run
from fdcompile.runtime.runner import ProgramRunner
from fdcompile.runtime.runner_cache import CompiledRunnerCache, NoProgram, RunnerCache
from fdcompile.runtime.slot import CallSlot
from fdcompile.runtime.stages import predict

_WRAPPED = "its forward was wrapped before it was optimised, and a wrapper may do anything: wrap it afterwards"
_OTHER_SCHEDULER = "a pipeline with another scheduler made the call: call fdcompile.optimize on that pipeline, too"


class Executor:
    """Runs one UNet step-aware.

    Attributes:
        run: the run that is going on or was the last one; None before the first.
        record: what the last run did; None before the first call.
        runner_cache: what answers calls.
    """

    def __init__(self, unet: nn.Module, config: Config, runner_cache: RunnerCache) -> None:
        self.config = config
        self.runner_cache = runner_cache
        self.clock = Clock()
        self.run: Run | None = None
        self.record: RunRecord | None = None
        self._interface = UNetInterface.of(unet)
        self._forecast = Forecast(config)
        self._ranks = Ranks(config.process_group, config.forecast)
        self._warned = False

    @property
    def _guards(self) -> Guards:
        return self.runner_cache.graph_cache.guards

    def unet_called(self, event: Called) -> Any:
        """Answers a call of the UNet."""
        if event.wrapped:
            self._guards.refresh()
            return self._stock(None, self._guards.unsupported_reason or _WRAPPED, event)
        call = self._interface.parse(event.args, event.kwargs, self.run.last_call if self.run else None)
        position = self.clock.locate(call.timestep, event.scheduler.timesteps)
        if position is not None:
            self._enter(position, call.timestep, event)
        answer = self._choose(call, position, event)
        if isinstance(answer, Stock):
            self._ranks.agree(self.run, call, position, answer)
            return self._stock(position, answer.reason, event)
        assert position is not None and self.run is not None
        slot, decision = answer
        self._ranks.agree(self.run, call, position, decision)
        prediction = predict(self.run, slot, call, position, decision, self._forecast, self._ranks)
        if not call.return_dict:
            return (prediction,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=prediction)

    def controlnet_called(self, event: Called) -> Any:
        """Answers a call of a ControlNet: at a step that will reuse features with the residuals of the key step."""
        call = ControlNetCall.parse(event.forward, event.args, event.kwargs)
        position = self.clock.preview(call.timestep, event.scheduler.timesteps)
        if position is None:
            self._count_controlnet()
            return call.forward()
        self._enter(position, call.timestep, event)
        assert self.run is not None
        controlnets = self.run.controlnets
        if controlnets.changed(call, position):
            self.run.end_group(position)
        elif self.run.will_reuse(position) and self._stock_reason(position) is None and controlnets.may_skip(position):
            return controlnets.skip(call, position)
        self._count_controlnet()
        return controlnets.execute(call, position)

    def scheduler_stepped(self) -> None:
        self.clock.scheduler_stepped()

    def adopt(self, other: Executor) -> None:
        """Takes over what another executor of the same UNet has captured and, as far as its config allows, compiled."""
        if isinstance(self.runner_cache, CompiledRunnerCache) and isinstance(other.runner_cache, CompiledRunnerCache):
            self.runner_cache.adopt(other.runner_cache)

    def _enter(self, position: Position, timestep: Any, event: Called) -> None:
        """Begins a run if `position` is of another than the last one."""
        if self.run is not None and position.generation == self.run.generation:
            return
        timesteps, caller = self.clock.schedule_of(timestep, event.scheduler.timesteps), event.find_caller()
        rest, announced = len(timesteps) - position.start, caller.announced_steps
        num_steps = announced if announced is not None and 0 < announced < rest else rest
        key_steps = self._forecast.begin_run(caller.scheduler, timesteps, position.start, num_steps)
        if not self._warned and (warning := few_steps_warning(self.config.key_steps, num_steps)):
            warnings.warn(warning, stacklevel=2)
            self._warned = True
        self.runner_cache.follow_unet()
        for runner in self.runner_cache.runners.values():
            runner.begin_run()
        before = self.record if self.run is not None else None
        alike = before is not None and (before.start, before.num_steps) == (position.start, num_steps)
        breaks = sorted(set(before.forced)) if before is not None and alike else []
        self.record = RunRecord(position.start, num_steps, self.runner_cache, self._ranks.count)
        epoch = self._guards.epoch
        self.run = Run(position.generation, timesteps, key_steps, epoch, caller, self.record, breaks)

    def _stock_reason(self, position: Position | None) -> str | None:
        guards = self._guards
        if guards.unsupported_reason is None and guards.changed_within_run():
            guards.refresh()
        changed = self.run is None or guards.epoch != self.run.epoch
        return stock_reason(position, guards.unsupported_reason, changed, torch.is_grad_enabled())

    def _choose(
        self, call: UNetCall, position: Position | None, event: Called
    ) -> Stock | tuple[CallSlot, KeyStep | Reuse]:
        """How to answer `call`."""
        if (reason := self._stock_reason(position)) is not None:
            elsewhere = position is None and event.find_caller().scheduler is not event.scheduler
            return Stock(_OTHER_SCHEDULER if elsewhere else reason)
        if call.signature.unknown is not None:
            return Stock(f"{call.signature.unknown}: an object that may change, or be another each time")
        try:
            runner = self.runner_cache.find(call) or self.runner_cache.make(call)
        except NoProgram as error:
            return Stock(str(error))
        except StatefulError:
            return Stock(str(self._guards.unsupported_reason))
        assert position is not None and self.run is not None
        slot = self._slot(self.run, call, position, runner)
        return slot, decide(call, position.step, slot, self.run.controlnets.follows(position))

    def _slot(self, run: Run, call: UNetCall, position: Position, runner: ProgramRunner) -> CallSlot:
        key = run.slots.key_of(call, position, runner)
        if key not in run.slots or not run.slots[key].answers(call, runner):
            schedule = runner.schedule(call, run.timesteps)
            run.slots[key] = CallSlot(runner, call.batch, schedule, self._interface.fixed_channels(call.sample))
        run.slots.mark(key, call, position)
        return run.slots[key]

    def _stock(self, position: Position | None, reason: str, event: Called) -> Any:
        """Runs the stock UNet. Calls that belong to no step are put down to the run they are in, if it goes on."""
        if self.record is None or (position is None and self.run is not None and self.run.finished):
            self.run, self.record = None, RunRecord(0, 0, self.runner_cache)
        self.record.add_stock_call(position, reason)
        if self.run is not None and position is not None:
            self.run.skip(position)
        return event.forward(*event.args, **event.kwargs)

    def _count_controlnet(self) -> None:
        if self.record is not None:
            self.record.controlnet_runs += 1
