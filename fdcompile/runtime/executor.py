"""Answers UNet calls from the staged program: encoder at key steps, decoders of a group together."""

from __future__ import annotations

import bisect
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fdcompile.capture.call import UNetCall
from fdcompile.config import Config
from fdcompile.graph.program import BindingTime
from fdcompile.key_steps import resolve_key_steps
from fdcompile.runtime.clock import Clock, Position
from fdcompile.runtime.conditioning import Conditioning
from fdcompile.runtime.programs import CapturedPrograms, Programs
from fdcompile.runtime.report import Run
from fdcompile.runtime.staged import StagedUNet, Values

if TYPE_CHECKING:
    pass


@dataclass
class _Group:
    """A key step and the steps that reuse its features: steps `start` to `stop` - 1."""

    start: int
    stop: int
    features: Values
    predictions: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class _Lane:
    """State of the n-th UNet call of every step, valid for one run, one signature and one batch size."""

    compiled: StagedUNet
    batch: int
    schedule: Values
    conditioning: Conditioning
    prompt: Values = field(default_factory=dict)
    schedule_prompt: Values = field(default_factory=dict)
    group: _Group | None = None
    copies: int | None = None


class Executor:
    """Runs one UNet step-aware.

    Attributes:
        run: record of the last run, or None before the first.
        complete: gives a UNet call at a key step the residuals of a ControlNet that was not run; None without one.
        controlnet_runs: how often the ControlNet ran since the UNet's last call.
        programs: what answers calls.
    """

    def __init__(
        self,
        unet: nn.Module,
        config: Config,
        clock: Clock,
        programs: Programs,
        announced_steps: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.config = config
        self.clock = clock
        self.run: Run | None = None
        self.complete: Callable[[UNetCall, int], UNetCall] | None = None
        self.controlnet_runs = 0
        self.programs = programs
        self.key_steps: tuple[int, ...] = ()
        self._announced_steps = announced_steps
        self._parameters = inspect.signature(unet.forward)
        self._captured = programs.structure.baked
        self._lanes: dict[int, _Lane] = {}
        self._breaks: list[int] = []

    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answers ``forward(*args, **kwargs)``; `forward` is the stock UNet's."""
        if self.programs.capturing:
            return forward(*args, **kwargs)
        call = UNetCall.parse(self._parameters, args, kwargs)
        position = self.clock.locate(call.timestep)
        if position is None:
            self.run = self.run or Run(-1, 0, 0, self.programs.staged)
        elif self.run is None or position.generation != self.run.generation:
            self._begin_run(position)
        assert self.run is not None
        self.run.controlnet_runs += self.controlnet_runs
        self.controlnet_runs = 0
        reason = self._why_stock(position)
        if reason is None:
            compiled = self.programs.find(call) or self.programs.make(call)
            reason = self.programs.structure.managed  # a capture may have found it out
        if reason is not None:
            self.run.record_full(position, reason)
            return forward(*args, **kwargs)
        assert position is not None
        prediction = self._predict(call, position, compiled)
        if not call.return_dict:
            return (prediction,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=prediction)

    def reuses(self, position: Position) -> bool:
        """Whether the UNet's next call, if it is made at `position`, is to be answered from a group's features."""
        lane = self._lanes.get(position.lane)
        if lane is None or lane.group is None or self.run is None or position.generation != self.run.generation:
            return False
        return lane.group.start < position.step < lane.group.stop and self._why_stock(position) is None

    def end_group(self, position: Position) -> None:
        """Makes the call at `position` a key step."""
        if lane := self._lanes.get(position.lane):
            lane.group = None

    def _why_stock(self, position: Position | None) -> str | None:
        """Why this call cannot be answered from the program, or None if it can."""
        if position is None:
            return "the timestep is no element of scheduler.timesteps"
        if position.ambiguous:
            return "the scheduler has stepped more than once at a step: several latents may take turns"
        if torch.is_grad_enabled():
            return "gradients are enabled: run it under torch.no_grad()"
        if self.programs.structure.managed is None and self.programs.structure.dials_turned():
            self.programs.structure.refresh()
        if self.programs.structure.managed is None and self.programs.structure.baked is not self._captured:
            if self.programs.structure.baked != self._captured:
                return "an adapter or attention processor was changed during the run"
            self._captured = self.programs.structure.baked
        return self.programs.structure.managed

    def _begin_run(self, position: Position) -> None:
        num_steps = self._num_steps(position)
        self._lanes.clear()
        key_steps = resolve_key_steps(self.config.key_steps, num_steps)
        self.key_steps = tuple(position.start + key for key in key_steps)
        self.programs.structure.refresh()
        if self.programs.structure.baked != self._captured:
            self.programs.follow_unet()
            self._captured = self.programs.structure.baked
        for staged in self.programs.staged.values():
            staged.begin_run()
        before = self.run
        alike = before is not None and (before.start, before.num_steps) == (position.start, num_steps)
        self._breaks = sorted(set(before.forced)) if before is not None and alike else []
        self.run = Run(position.generation, position.start, num_steps, self.programs.staged)

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
        group = lane.group
        if group is None or not group.start <= position.step < group.stop:
            if self.complete is not None:
                call = self.complete(call, position.lane)
            group = self._begin_group(lane, call, position.step)
        if position.step not in group.predictions:
            self._decode(lane, group, call, position.step)
        prediction = group.predictions.pop(position.step)
        if position.step + 1 == group.stop:
            lane.group = None  # its features are not needed again; hold no memory between runs
        return prediction

    def _lane(self, call: UNetCall, position: Position, compiled: StagedUNet) -> _Lane:
        lane = self._lanes.get(position.lane)
        if lane is None or lane.compiled is not compiled or lane.batch != call.batch:
            schedule = compiled.schedule(call, self.clock.timesteps)
            lane = _Lane(compiled, call.batch, schedule, Conditioning())
            self._lanes[position.lane] = lane
        return lane

    def managed(self) -> str | None:
        """Why no graph can stand in for the UNet as it is now, or None if one can."""
        self.programs.structure.refresh()
        return self.programs.structure.managed

    def adopt(self, other: Executor) -> None:
        """Takes over what another executor of the same UNet has captured and, as far as its config allows, compiled."""
        if isinstance(self.programs, CapturedPrograms) and isinstance(other.programs, CapturedPrograms):
            self.programs.adopt(other.programs)
            self._captured = other._captured

    def _condition(self, lane: _Lane, call: UNetCall) -> None:
        """Computes what follows from the prompt; whatever followed from another one is dropped."""
        lane.group = None
        inputs = lane.compiled.bind_inputs(call, BindingTime.PROMPT)
        lane.prompt = lane.compiled.run("prompt", inputs, lane.batch) | inputs
        steps = len(self.clock.timesteps)
        lane.schedule_prompt = lane.compiled.run("schedule_prompt", lane.schedule | lane.prompt, lane.batch, steps)
        lane.conditioning = Conditioning(call.of_time(BindingTime.PROMPT))

    def _begin_group(self, lane: _Lane, call: UNetCall, step: int) -> _Group:
        assert self.run is not None
        inputs = lane.compiled.bind_inputs(call, BindingTime.LATENT, BindingTime.KEY)
        known = lane.prompt | self._at(lane, step) | inputs
        known |= lane.compiled.run("shallow", known, lane.batch)
        known |= self._run_shared(lane, known, call.tensors[call.names.index("sample")])
        known |= lane.compiled.run("encoder", known, lane.batch)
        kept = {value.name: known[value.name] for value in lane.compiled.program.features}
        kept |= lane.compiled.bind_inputs(call, BindingTime.KEY)
        index = bisect.bisect_right(self.key_steps, step)
        last = self.run.start + self.run.num_steps
        end = self.key_steps[index] if index < len(self.key_steps) else max(last, step + 1)
        lane.group = _Group(step, end, kept)
        self.run.record_group(step, end, kept, planned=step in self.key_steps)
        if "shallow" in lane.compiled.program.stages:
            self._finish_step(lane, lane.group, known, step)
        return lane.group

    def _run_shared(self, lane: _Lane, known: Values, sample: Tensor) -> Values:
        """Runs what does not depend on the prompt, once for all copies of the latent that guidance has stacked."""
        stage = lane.compiled.program.stages.get("shared")
        if stage is None:
            return {}
        if lane.copies != 1:  # where they once differed, they are not compared again
            lane.copies = _count_copies(sample)
        one = lane.batch // lane.copies
        outputs = lane.compiled.run("shared", {value.name: known[value.name][:one] for value in stage.inputs}, one)
        return {name: output.repeat(lane.copies, *[1] * (output.ndim - 1)) for name, output in outputs.items()}

    def _decode(self, lane: _Lane, group: _Group, call: UNetCall, step: int) -> None:
        """Predicts `step` and, where nothing fresh reads the latent, as many steps of the group after it as allowed."""
        assert self.run is not None
        program = lane.compiled.program
        if not program.parallel:
            known = lane.prompt | self._at(lane, step) | group.features
            known |= lane.compiled.bind_inputs(call, BindingTime.LATENT)
            known |= lane.compiled.run("shallow", known, lane.batch)
            self._finish_step(lane, group, known, step)
            return
        if "decoder" not in program.stages:
            group.predictions[step] = group.features[program.output].clone()
            return
        predictions = self._decode_together(lane, group, step)
        group.predictions.update(enumerate(predictions, start=step))
        self.run.record_decode(len(predictions))

    def _decode_together(self, lane: _Lane, group: _Group, step: int) -> Tensor:
        """Predictions of `step` and steps after it, shape ``[steps, batch, ...]``.

        As many as memory allows, and not beyond a step at which the run before turned out to need new features
        (``control_guidance_end``): this one probably does, too.
        """
        while True:
            following = bisect.bisect_right(self._breaks, step)
            stop = min([group.stop, *self._breaks[following : following + 1]])
            count = min(lane.compiled.max_steps(lane.batch), stop - step)
            known = lane.prompt | self._at(lane, slice(step, step + count)) | group.features
            try:
                return lane.compiled.run("decoder", known, lane.batch, count)[lane.compiled.program.output]
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
            lane.compiled.limit_steps(lane.batch, max(1, count // 2))

    def _finish_step(self, lane: _Lane, group: _Group, known: Values, step: int) -> None:
        assert self.run is not None
        known = known | lane.compiled.run("decoder", known, lane.batch)
        group.predictions[step] = known[lane.compiled.program.output]
        self.run.record_decode(1)

    def _at(self, lane: _Lane, steps: int | slice) -> Values:
        return {name: value[steps] for name, value in (lane.schedule | lane.schedule_prompt).items()}


def _count_copies(sample: Tensor) -> int:
    """How many times `sample` repeats one batch of latents: 2 or 3 under guidance, else 1. Waits for the device."""
    for copies in (2, 3):
        first, *others = sample.chunk(copies)
        if len(others) == copies - 1 and all(torch.equal(first, other) for other in others):
            return copies
    return 1
