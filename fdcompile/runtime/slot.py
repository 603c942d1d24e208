"""What a run knows at one of its UNet calls."""

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
    """What the next group's forecast needs of a key step.

    Attributes:
        before: the features of the key step before, where the next forecast is damped.
    """

    step: int
    features: Tensors
    before: Tensors = field(default_factory=dict)


class AtSteps(dict[str, Tensor]):
    """Tensors at a step or several. Those that are held for the whole schedule are taken from it when they are read."""

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
        schedule: values known from the timesteps, with a leading axis of one entry a step.
        prompt: values known from the prompt.
        schedule_prompt: values known from both, as `schedule`.
        weights: of the features of the key step before, as `schedule`.
        step: the step of its last call, and `sample` the latents of that call.
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
    prompt_tensors: tuple[Tensor, ...] = ()

    def forget(self) -> None:
        """Makes the next call a key step without a key step before it."""
        self.group = self.last_key = None

    def at(self, steps: int | slice, known: Tensors) -> Tensors:
        """`known`, and what is known of `steps` beforehand."""
        return AtSteps(known, self.schedule | self.schedule_prompt | self.weights, steps)

    def answers(self, call: UNetCall, runner: ProgramRunner) -> bool:
        return self.runner is runner and self.batch == call.batch


class CallSlots(dict[int, CallSlot]):
    """The slots of a run, by the place of their first call within a step.

    A pipeline that samples in tiles makes several calls a step that differ in nothing but their latents, and may make
    them in another order at each step. Such a call belongs to the slot whose latents it continues: the nearest.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tiles: dict[int, list[int]] | None = None

    def key_of(self, call: UNetCall, position: Position, runner: ProgramRunner) -> int:
        """The key of the slot that `call` belongs to, or a new one. Waits for the device only if there are tiles."""
        place = position.slot
        if len(self) < 2 or position.step == position.start:
            return place
        if self._tiles is None:  # the first step is over, so that all of its calls are known
            self._tiles = self._find_tiles()
        tiles = self._tiles.get(place, [])
        if len(tiles) < 2:
            return place
        free = [key for key in tiles if self[key].step < position.step and self[key].answers(call, runner)]
        free.sort(key=lambda key: key != place)  # the usual one wins a tie
        if len(free) < 2:
            return free[0] if free else max(self) + 1
        return free[_nearest(call.sample, (self[key].sample for key in free))]

    def _find_tiles(self) -> dict[int, list[int]]:
        """By slot: those whose calls differ from its own in their latents only, itself included."""
        groups: list[list[int]] = []
        for key, slot in self.items():
            alike = next((group for group in groups if _alike(self[group[0]], slot)), None)
            if alike is None:
                groups.append([key])
            else:
                alike.append(key)
        return {key: group for group in groups for key in group}

    def mark(self, key: int, call: UNetCall, position: Position) -> None:
        """Notes that slot `key` was called. A pipeline may write to its latents in place: those of tiles are copied."""
        slot = self[key]
        slot.step = position.step
        maybe_tiles = len(self) > 1 or position.step == position.start
        slot.sample = call.sample.clone() if maybe_tiles else None


def _alike(one: CallSlot, other: CallSlot) -> bool:
    """Whether calls of two slots differ in their latents only. Waits for the device."""
    if one.runner is not other.runner or one.batch != other.batch:
        return False
    pairs = zip(one.prompt_tensors, other.prompt_tensors, strict=True)
    return all(mine is its or equal(mine, its) for mine, its in pairs)


def _nearest(sample: Tensor, others: Iterable[Tensor | None]) -> int:
    distances = [
        (sample - other).float().square().sum() if other is not None else sample.new_full((), torch.inf).float()
        for other in others
    ]
    return int(torch.stack(distances).argmin())
