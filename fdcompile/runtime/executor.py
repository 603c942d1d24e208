"""Answers UNet calls from the staged program: encoder at key steps, decoders of a group together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fdcompile.capture.call import UNetCall
from fdcompile.config import Config
from fdcompile.runtime.clock import Clock, Position
from fdcompile.runtime.controlnet import ControlNetCall
from fdcompile.runtime.forecast import Forecaster
from fdcompile.runtime.forward_call import ForwardCall
from fdcompile.runtime.interface import UNetInterface
from fdcompile.runtime.policy import OTHER_SCHEDULER, WRAPPED, KeyStep, Reuse, Stock, decide, stock_reason
from fdcompile.runtime.ranks import Ranks
from fdcompile.runtime.record import RunRecord
from fdcompile.runtime.run import Run
from fdcompile.runtime.runner_cache import NoProgram, RunnerCache
from fdcompile.runtime.slot import CallSlot
from fdcompile.runtime.stages import predict


class Executor:
    """Answers the calls of one UNet and of its ControlNets.

    Attributes:
        run: the current or last run; None before the first.
        record: record of that run; None before the first call.
        runner_cache: runners of the UNet's programs.
    """

    def __init__(
        self, unet: nn.Module, config: Config, runner_cache: RunnerCache, plan_notes: tuple[str, ...] = ()
    ) -> None:
        self.runner_cache = runner_cache
        self.clock = Clock()
        self.run: Run | None = None
        self.record: RunRecord | None = None
        self._guards = runner_cache.graph_cache.guards
        self._interface = UNetInterface.of(unet)
        self._forecaster = Forecaster(config, plan_notes)
        self._ranks = Ranks(config.process_group, config.forecast)

    def unet_called(self, event: ForwardCall) -> Any:
        """Answers a call of the UNet."""
        if event.wrapped:
            self._guards.refresh()
            return self._stock(None, self._guards.unsupported_reason or WRAPPED, event)
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
        prediction = predict(self.run, slot, call, position, decision, self._forecaster, self._ranks)
        return self._interface.output(call, prediction)

    def controlnet_called(self, event: ForwardCall) -> Any:
        """Answers a call of a ControlNet, at steps that reuse features with the residuals of the key step."""
        call = ControlNetCall.parse(event.forward, event.args, event.kwargs)
        position = self.clock.preview(call.timestep, event.scheduler.timesteps)
        if position is None:
            if self.record is not None:
                self.record.controlnet_runs += 1
            return call.forward()
        self._enter(position, call.timestep, event)
        assert self.run is not None
        reuse = self.run.will_reuse(position) and self._stock_reason(position) is None
        return self.run.controlnet_called(call, position, reuse)

    def _enter(self, position: Position, timestep: Any, event: ForwardCall) -> None:
        """Begins a run if `position` belongs to a new one."""
        if self.run is not None and position.generation == self.run.generation:
            return
        timesteps = self.clock.schedule_of(timestep, event.scheduler.timesteps)
        last = self.record if self.run is not None else None
        self.run = Run.begin(
            position, timesteps, event.find_caller(), self._forecaster, self.runner_cache, self._ranks.count, last
        )
        self.record = self.run.record

    def _stock_reason(self, position: Position | None, unknown_argument: str | None = None) -> str | None:
        guards = self._guards
        if guards.unsupported_reason is None and guards.changed_within_run():
            guards.refresh()
        changed = self.run is None or guards.epoch != self.run.epoch
        return stock_reason(position, guards.unsupported_reason, changed, torch.is_grad_enabled(), unknown_argument)

    def _choose(
        self, call: UNetCall, position: Position | None, event: ForwardCall
    ) -> Stock | tuple[CallSlot, KeyStep | Reuse]:
        """Decides how to answer `call`."""
        if (reason := self._stock_reason(position, call.signature.unknown)) is not None:
            elsewhere = position is None and event.find_caller().scheduler is not event.scheduler
            return Stock(OTHER_SCHEDULER if elsewhere else reason)
        try:
            runner = self.runner_cache.get(call)
        except NoProgram as error:
            return Stock(str(error))
        assert position is not None and self.run is not None
        slot = self.run.slot(call, position, runner, self._interface)
        return slot, decide(call, position.step, slot, self.run.controlnets.follows(position))

    def _stock(self, position: Position | None, reason: str, event: ForwardCall) -> Any:
        """Runs the stock UNet. Calls without a position are recorded in the current run if it is not finished."""
        if self.record is None or (position is None and self.run is not None and self.run.finished):
            self.run, self.record = None, RunRecord(0, 0, self.runner_cache)
        self.record.add_stock_call(position, reason)
        if self.run is not None and position is not None:
            self.run.skip(position)
        return event.forward(*event.args, **event.kwargs)
