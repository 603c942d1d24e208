"""What a run knows at one of its UNet calls: state that dies with the run."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fdcompile.runtime.conditioning import Conditioning, FixedChannels
from fdcompile.runtime.staged import StagedUNet, Values


@dataclass
class Group:
    """A key step and the steps that reuse its features: steps `start` to `stop` - 1."""

    start: int
    stop: int
    features: Values
    predictions: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class KeyStep:
    """What the next group's forecast needs of a key step."""

    step: int
    features: Values


@dataclass
class Lane:
    """State of the n-th UNet call of every step, valid for one run, one signature and one batch size."""

    compiled: StagedUNet
    batch: int
    schedule: Values
    conditioning: Conditioning
    prompt: Values = field(default_factory=dict)
    schedule_prompt: Values = field(default_factory=dict)
    group: Group | None = None
    last: KeyStep | None = None
    weights: Values = field(default_factory=dict)
    copies: int | None = None
    residuals: Conditioning = field(default_factory=Conditioning)
    channels: FixedChannels | None = None

    def forget(self) -> None:
        """Makes the next call a key step that has none before it."""
        self.group = self.last = None
