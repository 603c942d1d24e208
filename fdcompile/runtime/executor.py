"""Answers UNet calls from the staged program: encoder at key steps, decoders of a group together."""

from __future__ import annotations

import bisect
import inspect
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fdcompile.capture.call import UNetCall
from fdcompile.capture.export import StatefulError
from fdcompile.capture.guards import Guards
from fdcompile.config import Config
from fdcompile.graph.program import FORECAST_WEIGHT, BindingTime
from fdcompile.key_steps import few_steps_warning
from fdcompile.runtime.clock import Clock, Position
from fdcompile.runtime.conditioning import Conditioning, FixedChannels
from fdcompile.runtime.forecast import Forecast, Guidance
from fdcompile.runtime.lane import Group, KeyStep, Lane
from fdcompile.runtime.programs import CapturedPrograms, NoProgram, Programs
from fdcompile.runtime.ranks import Ranks
from fdcompile.runtime.report import Run
from fdcompile.runtime.staged import StagedUNet, Tensors


class Residuals(Protocol):
    """The ControlNets that are followed.

    Attributes:
        runs: how often one ran since this was last set to 0.
    """

    runs: int

    def follows(self, position: Position) -> bool:
        """Whether one was called at `position`, so that a change of its conditioning would have been seen."""

    def complete(self, call: UNetCall, position: Position) -> UNetCall:
        """The UNet call of a key step, with the residuals of a ControlNet that was not run so far."""


_WRAPPED = "its forward was wrapped before it was optimised, and a wrapper may do anything: wrap it afterwards"


class Executor:
    """Runs one UNet step-aware.

    Attributes:
        run: record of the last run, or None before the first.
        residuals: what is known of the ControlNets whose residuals the UNet is given.
        programs: what answers calls.
    """

    def __init__(
        self,
        unet: nn.Module,
        config: Config,
        clock: Clock,
        programs: Programs,
        residuals: Residuals,
        announced_steps: Callable[[], int | None] = lambda: None,
        guidance: Callable[[], Guidance | None] = lambda: None,
    ) -> None:
        self.config = config
        self.clock = clock
        self.run: Run | None = None
        self.residuals = residuals
        self.programs = programs
        self.key_steps: tuple[int, ...] = ()
        self._announced_steps = announced_steps
        self._forecast = Forecast(config, guidance)
        _, *parameters = inspect.signature(type(unet).forward).parameters.values()
        self._parameters = inspect.Signature(parameters)
        own = getattr(unet, "config", None)
        taken = getattr(own, "in_channels", 0)
        self._channels = taken, getattr(own, "out_channels", taken)  # Kandinsky 3's has as many, and does not say so
        self._epoch = programs.captures.epoch
        self._lanes: dict[int, Lane] = {}
        self._breaks: list[int] = []
        self._warned = False
        self._call: UNetCall | None = None
        self._ranks = Ranks(config.process_group)

    def __call__(
        self, forward: Callable[..., Any], wrapped: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Answers ``forward(*args, **kwargs)``; `wrapped` says whether that is more than the UNet's own forward."""
        if wrapped:
            self._guards.refresh()
            return self._stock(None, self._guards.unsupported_reason or _WRAPPED, forward, args, kwargs)
        call = self._call = UNetCall.parse(self._parameters, args, kwargs, last=self._call)
        position = self.clock.locate(call.timestep)
        begins = position is not None and (self.run is None or position.generation != self.run.generation)
        if position is not None and begins:
            self._begin_run(position)
        if position is not None and self.run is not None:
            self.run.last_step = position.step
        reason = self._why_stock(position)
        if reason is None and call.signature.unknown is not None:
            reason = f"{call.signature.unknown}: an object that may change, or be another each time"
        if reason is None and (staged := self.programs.find(call)) is None:
            try:
                staged = self.programs.make(call)
            except NoProgram as none:
                reason = str(none)
            except StatefulError:
                reason = self._guards.unsupported_reason
        if begins:
            self._ranks.agree(call, self.clock.timesteps, self.key_steps, self.config.forecast, reason)
        if reason is not None:
            return self._stock(position, reason, forward, args, kwargs)
        assert position is not None and self.run is not None and staged is not None
        self._count_controlnets(self.run)
        prediction = self._predict(call, position, staged)
        if not call.return_dict:
            return (prediction,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=prediction)

    def _stock(
        self,
        position: Position | None,
        reason: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs the stock UNet. Calls that belong to no step are put down to the run they are in, if it goes on."""
        if self.run is None or (position is None and self.run.finished):
            self.run = Run(-1, 0, 0, self.programs)
        self._call = None
        self._count_controlnets(self.run)
        self.run.record_full(position, reason)
        if position is not None and (lane := self._lanes.get(position.lane)):
            lane.last = None
        return forward(*args, **kwargs)

    def _count_controlnets(self, run: Run) -> None:
        run.controlnet_runs += self.residuals.runs
        self.residuals.runs = 0

    @property
    def _guards(self) -> Guards:
        return self.programs.captures.guards

    def reuses(self, position: Position) -> bool:
        """Whether the UNet's next call, if it is made at `position`, is to be answered from a group's features."""
        lane = self._lanes.get(position.lane)
        if lane is None or lane.group is None or self.run is None or position.generation != self.run.generation:
            return False
        return lane.group.start < position.step < lane.group.stop and self._why_stock(position) is None

    def end_group(self, position: Position) -> None:
        """Makes the call at `position` a key step."""
        if lane := self._lanes.get(position.lane):
            lane.forget()

    def _why_stock(self, position: Position | None) -> str | None:
        """Why this call cannot be answered from the program, or None if it can."""
        if position is None:
            return "the timestep is no element of scheduler.timesteps"
        if position.backwards:
            return "the schedule is walked backwards, as an inversion does"
        if position.ambiguous:
            return "the scheduler has stepped more than once at a step: several latents may take turns"
        if torch.is_grad_enabled():
            return "gradients are enabled: run it under torch.no_grad()"
        if self._guards.unsupported_reason is None and self._guards.changed_within_run():
            self._guards.refresh()
        if self._guards.unsupported_reason is None and self._guards.epoch != self._epoch:
            return "a module, an adapter or an attention processor was changed during the run"
        return self._guards.unsupported_reason

    def _begin_run(self, position: Position) -> None:
        num_steps = self._num_steps(position)
        self._lanes.clear()
        self.key_steps = self._forecast.begin_run(self.clock.timesteps, position.start, num_steps)
        if not self._warned and (warning := few_steps_warning(self.config.key_steps, num_steps)):
            warnings.warn(warning, stacklevel=2)
            self._warned = True
        self.programs.follow_unet()
        self._epoch = self._guards.epoch
        for staged in self.programs.staged.values():
            staged.begin_run()
        before = self.run
        alike = before is not None and (before.start, before.num_steps) == (position.start, num_steps)
        self._breaks = sorted(set(before.forced)) if before is not None and alike else []
        self.run = Run(position.generation, position.start, num_steps, self.programs, self._ranks.count)

    @property
    def _stop(self) -> int:
        """The step after the run's last one."""
        assert self.run is not None
        return self.run.start + self.run.num_steps

    def _num_steps(self, position: Position) -> int:
        """Steps of a run from `position` on; a pipeline that stops early (``denoising_end``) says so beforehand."""
        rest = len(self.clock.timesteps) - position.start
        announced = self._announced_steps()
        return announced if announced is not None and 0 < announced < rest else rest

    def _predict(self, call: UNetCall, position: Position, compiled: StagedUNet) -> Tensor:
        lane = self._lane(call, position, compiled)
        lane.compiled.answered[lane.batch] += 1
        if not lane.conditioning.same_as(call.of_time(BindingTime.PROMPT)):
            self._condition(lane, call)
        if not self._same_images(lane, call, position):
            lane.forget()
        group = lane.group
        if group is None or not group.start <= position.step < group.stop:
            lane.residuals = Conditioning(call.of_time(BindingTime.KEY))
            call = self.residuals.complete(call, position)
            group = self._begin_group(lane, call, position.step)
        if position.step not in group.predictions:
            self._decode(lane, group, call, position.step)
        prediction = group.predictions.pop(position.step)
        if position.step + 1 == group.stop:
            lane.group = None  # its features are not needed again, but for a forecast; hold no memory between runs
            if group.stop >= self._stop:
                lane.forget()
                self._call = None
        return prediction

    def _same_images(self, lane: Lane, call: UNetCall, position: Position) -> bool:
        """Whether what the UNet is shown besides the prompt is still what the group was computed for.

        Residuals of a ControlNet that is followed move with the latent, and it would have said if they had another
        reason to. Any others must be equal, and so must channels beside the latent.
        """
        if lane.channels is not None and not lane.channels.same_as(call.sample):
            return False
        residuals = call.of_time(BindingTime.KEY)
        return not residuals or self.residuals.follows(position) or lane.residuals.same_as(residuals)

    def _lane(self, call: UNetCall, position: Position, compiled: StagedUNet) -> Lane:
        lane = self._lanes.get(position.lane)
        if lane is None or lane.compiled is not compiled or lane.batch != call.batch:
            schedule = compiled.schedule(call, self.clock.timesteps)
            lane = Lane(compiled, call.batch, schedule, Conditioning(), channels=self._fixed_channels(call.sample))
            self._lanes[position.lane] = lane
        return lane

    def _fixed_channels(self, sample: Tensor) -> FixedChannels | None:
        """Watches what rides beside the latent, in a UNet that takes more channels than it predicts."""
        taken, predicted = self._channels
        if taken <= predicted or taken not in sample.shape[1:3]:
            return None
        return FixedChannels(1 + sample.shape[1:3].index(taken), predicted)

    def adopt(self, other: Executor) -> None:
        """Takes over what another executor of the same UNet has captured and, as far as its config allows, compiled."""
        if isinstance(self.programs, CapturedPrograms) and isinstance(other.programs, CapturedPrograms):
            self.programs.adopt(other.programs)
            self._epoch = other._epoch

    def _condition(self, lane: Lane, call: UNetCall) -> None:
        """Computes what follows from the prompt; whatever followed from another one is dropped."""
        lane.forget()
        inputs = lane.compiled.bind_inputs(call, BindingTime.PROMPT)
        lane.prompt = lane.compiled.run("prompt", inputs, lane.batch) | inputs
        steps = len(self.clock.timesteps)
        lane.schedule_prompt = lane.compiled.run("schedule_prompt", lane.schedule | lane.prompt, lane.batch, steps)
        lane.conditioning = Conditioning(call.of_time(BindingTime.PROMPT))

    def _begin_group(self, lane: Lane, call: UNetCall, step: int) -> Group:
        assert self.run is not None
        inputs = lane.compiled.bind_inputs(call, BindingTime.LATENT, BindingTime.KEY)
        known = lane.at(step, lane.prompt | inputs)
        known |= lane.compiled.run("shallow", known, lane.batch)
        known |= lane.compiled.run("encoder", known, lane.batch)
        kept = {value.name: known[value.name] for value in lane.compiled.program.features}
        kept |= lane.compiled.bind_inputs(call, BindingTime.KEY)
        kept |= self._look_back(lane, kept, step)
        index = bisect.bisect_right(self.key_steps, step)
        end = self.key_steps[index] if index < len(self.key_steps) else max(self._stop, step + 1)
        lane.group = Group(step, end, kept)
        self.run.record_group(step, end, kept, planned=step in self.key_steps)
        if "shallow" in lane.compiled.program.stages:
            self._finish_step(lane, lane.group, lane.at(step, known | kept), step)
        return lane.group

    def _look_back(self, lane: Lane, features: Tensors, step: int) -> Tensors:
        """The features of the key step before, as the decoder wants them; weighs them, and keeps those of this one."""
        assert self.run is not None
        reason = self._forecast.why_held(lane.last.step if lane.last else None, step)
        if reason is not None:
            self.run.held.append((step, reason))
        names = lane.compiled.program.features_before
        before, lane.last = lane.last, KeyStep(step, {name: features[own] for name, own in names.items()})
        if not names:
            return {}
        feature = next(iter(lane.last.features.values()))
        if before is None or reason is not None:
            lane.weights = {FORECAST_WEIGHT: feature.new_zeros(len(self.clock.timesteps))}
            return lane.last.features
        lane.weights = {FORECAST_WEIGHT: self._forecast.weights(before.step, step).to(feature)}
        return before.features

    def _decode(self, lane: Lane, group: Group, call: UNetCall, step: int) -> None:
        """Predicts `step` and, where no recomputed module reads the latent, as many steps after it as allowed."""
        assert self.run is not None
        program = lane.compiled.program
        if not lane.compiled.parallel:
            inputs = lane.compiled.bind_inputs(call, BindingTime.LATENT)
            known = lane.at(step, lane.prompt | group.features | inputs)
            known |= lane.compiled.run("shallow", known, lane.batch)
            self._finish_step(lane, group, known, step)
            return
        if "decoder" not in program.stages:
            group.predictions[step] = group.features[program.output].clone()
            return
        group.predictions.update(enumerate(self._decode_together(lane, group, step), start=step))

    def _decode_together(self, lane: Lane, group: Group, step: int) -> Tensor:
        """Predictions of `step` and steps after it, shape ``[steps, batch, ...]``.

        As many as memory allows, and not beyond a step at which the run before turned out to need new features
        (``control_guidance_end``): this one probably does, too. Ranks share them, and have the predictions of all.
        """
        assert self.run is not None
        following = bisect.bisect_right(self._breaks, step)
        stop = min([group.stop, *self._breaks[following : following + 1]])
        while True:
            most = lane.compiled.max_steps(lane.batch) if stop - step > 1 else 1  # to find out takes a while
            own, end = self._ranks.share(step, stop, most)
            count = own.stop - own.start
            if end < stop:
                self.run.decoded_at_most = end - step, lane.compiled.why_max_steps(lane.batch)
            known = lane.at(own, lane.prompt | group.features)
            try:
                outputs = lane.compiled.run("decoder", known, lane.batch, count)
                break
            except torch.OutOfMemoryError:
                if count == 1 or self._ranks.count > 1:  # other ranks wait for as many as were agreed upon
                    raise
            lane.compiled.limit_steps(lane.batch, max(1, count // 2))
        self.run.record_decode(count)
        return self._ranks.gather(outputs[lane.compiled.program.output], step, end)

    def _finish_step(self, lane: Lane, group: Group, known: Tensors, step: int) -> None:
        assert self.run is not None
        known |= lane.compiled.run("decoder", known, lane.batch)
        group.predictions[step] = known[lane.compiled.program.output]
        self.run.record_decode(1)
