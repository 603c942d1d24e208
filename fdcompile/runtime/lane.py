"""What a run knows at one of its UNet calls: state that dies with the run."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fdcompile.runtime.conditioning import Conditioning, FixedChannels
from fdcompile.runtime.staged import StagedUNet, Tensors


@dataclass
class Group:
    """A key step and the steps that reuse its features: steps `start` to `stop` - 1."""

    start: int
    stop: int
    features: Tensors
    predictions: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class KeyStep:
    """What the next group's forecast needs of a key step."""

    step: int
    features: Tensors


class AtSteps(dict[str, Tensor]):
    """Tensors at a step or several. Those held for the whole schedule are taken from it when they are read."""

    def __init__(self, known: Tensors, schedule: Tensors, steps: int | slice) -> None:
        super().__init__(known)
        self._schedule = schedule
        self._steps = steps

    def __missing__(self, name: str) -> Tensor:
        value = self[name] = self._schedule[name][self._steps]
        return value


@dataclass
class Lane:
    """State of the n-th UNet call of every step, valid for one run, one signature and one batch size."""

    compiled: StagedUNet
    batch: int
    schedule: Tensors
    conditioning: Conditioning
    prompt: Tensors = field(default_factory=dict)
    schedule_prompt: Tensors = field(default_factory=dict)
    group: Group | None = None
    last: KeyStep | None = None
    weights: Tensors = field(default_factory=dict)
    residuals: Conditioning = field(default_factory=Conditioning)
    channels: FixedChannels | None = None

    def forget(self) -> None:
        """Makes the next call a key step that has none before it."""
        self.group = self.last = None

    def at(self, steps: int | slice, known: Tensors) -> Tensors:
        """`known`, and what is known of `steps` beforehand."""
        return AtSteps(known, self.schedule | self.schedule_prompt | self.weights, steps)
