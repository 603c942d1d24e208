"""State of a call slot: one of the UNet calls that a pipeline makes at every step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fdcompile.capture.call import UNetCall
from fdcompile.capture.guards import equal
from fdcompile.runtime.clock import Position
from fdcompile.runtime.conditioning import Conditioning, FixedChannels
from fdcompile.runtime.runner import ProgramRunner, Tensors


@dataclass
class Group:
    """A key step and the steps that reuse its features: steps `start` to `stop` - 1."""

    start: int
    stop: int
    features: Tensors
    predictions: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class KeyFeatures:
    """Features of a key step, which the forecast of the next group reads.

    Attributes:
        before: features of the key step before it, if forecasts are damped.
    """

    step: int
    features: Tensors
    before: Tensors = field(default_factory=dict)


class AtSteps(dict[str, Tensor]):
    """Tensors at one or several steps. Tensors of the whole schedule are indexed when they are first read."""

    def __init__(self, known: Tensors, schedule: Tensors, steps: int | slice) -> None:
        super().__init__(known)
        self._schedule = schedule
        self._steps = steps

    def __missing__(self, name: str) -> Tensor:
        value = self[name] = self._schedule[name][self._steps]
        return value


@dataclass
class CallSlot:
    """State of one of the UNet calls that a pipeline makes at every step, for one signature and one batch size.

    Attributes:
        schedule: values that depend on the timesteps, with a leading axis of one entry per step.
        prompt: values that depend on the prompt.
        schedule_prompt: values that depend on both, with the leading axis of `schedule`.
        group: the current group; None if the next call must be a key step.
        last_key: features of the last key step, for a forecast.
        weights: forecast weights, with the leading axis of `schedule`.
        step: step of the last call.
        sample: latents of the last call, if the pipeline may sample in tiles.
    """

    runner: ProgramRunner
    batch: int
    schedule: Tensors
    channels: FixedChannels | None
    conditioning: Conditioning = field(default_factory=Conditioning)
    residuals: Conditioning = field(default_factory=Conditioning)
    prompt: Tensors = field(default_factory=dict)
    schedule_prompt: Tensors = field(default_factory=dict)
    group: Group | None = None
    last_key: KeyFeatures | None = None
    weights: Tensors = field(default_factory=dict)
    step: int = -1
    sample: Tensor | None = None

    def forget(self) -> None:
        """Makes the next call a key step without a forecast."""
        self.group = self.last_key = None

    def at(self, steps: int | slice, known: Tensors) -> Tensors:
        """Adds the values of the schedule at `steps` to `known`."""
        return AtSteps(known, self.schedule | self.schedule_prompt | self.weights, steps)

    def answers(self, call: UNetCall, runner: ProgramRunner) -> bool:
        return self.runner is runner and self.batch == call.batch


class CallSlots(dict[int, CallSlot]):
    """Slots of a run, by the index of their first call within a step.

    A pipeline that samples in tiles makes several calls per step that differ only in their latents, possibly in another
    order at each step. Such a call belongs to the slot with the nearest latents.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tiles: dict[int, list[int]] | None = None

    def key_of(self, call: UNetCall, position: Position, runner: ProgramRunner) -> int:
        """Key of the slot that `call` belongs to, or a new key. Synchronizes with the device if there are tiles."""
        place = position.slot
        if len(self) < 2 or position.step == position.start:
            return place
        if self._tiles is None:  # after the first step, all calls are known
            self._tiles = self._find_tiles()
        tiles = self._tiles.get(place, [])
        if len(tiles) < 2:
            return place
        free = [key for key in tiles if self[key].step < position.step and self[key].answers(call, runner)]
        free.sort(key=lambda key: key != place)  # prefers its own index in a tie
        if len(free) < 2:
            return free[0] if free else max(self) + 1
        return free[_nearest(call.sample, (self[key].sample for key in free))]

    def _find_tiles(self) -> dict[int, list[int]]:
        """Maps each slot to all slots, including itself, whose calls differ from its own only in the latents."""
        groups: list[list[int]] = []
        for key, slot in self.items():
            alike = next((group for group in groups if _alike(self[group[0]], slot)), None)
            if alike is None:
                groups.append([key])
            else:
                alike.append(key)
        return {key: group for group in groups for key in group}

    def mark(self, key: int, call: UNetCall, position: Position) -> None:
        """Records a call of slot `key`. Latents of possible tiles are copied, since pipelines may overwrite theirs."""
        slot = self[key]
        slot.step = position.step
        maybe_tiles = len(self) > 1 or position.step == position.start
        slot.sample = call.sample.clone() if maybe_tiles else None


def _alike(one: CallSlot, other: CallSlot) -> bool:
    """Whether calls of two slots differ only in the latents. Synchronizes with the device."""
    if one.runner is not other.runner or one.batch != other.batch:
        return False
    pairs = zip(one.conditioning.tensors, other.conditioning.tensors, strict=True)
    return all(mine is its or equal(mine, its) for mine, its in pairs)


def _nearest(sample: Tensor, others: Iterable[Tensor | None]) -> int:
    distances = [
        (sample - other).float().square().sum() if other is not None else sample.new_full((), torch.inf).float()
        for other in others
    ]
    return int(torch.stack(distances).argmin())
