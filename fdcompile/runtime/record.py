"""What a run did: counted while it goes on, and read by `Report` afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fdcompile.runtime.clock import Position
from fdcompile.runtime.runner_cache import RunnerCache


@dataclass
class RunRecord:
    """Plain counts of one run.

    Attributes:
        start: index of the run's first step in ``scheduler.timesteps``; `num_steps` follow from there.
        plan_notes: what is other than what the plan was made for.
        groups: (key step, first step after the group), in the order in which they were begun.
        forced: key steps that were not planned.
        held: (key step, why the features of its group were held where a forecast was configured).
        stock_calls: UNet calls that ran the stock UNet, by step (None: of no schedule) and reason.
    """

    start: int
    num_steps: int
    runner_cache: RunnerCache
    ranks: int = 1
    plan_notes: tuple[str, ...] = ()
    groups: list[tuple[int, int]] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    held: list[tuple[int, str]] = field(default_factory=list)
    decoder_evaluations: int = 0
    decoder_calls: int = 0
    decoded_at_most: tuple[int, str] | None = None
    stock_calls: Counter[tuple[int | None, str]] = field(default_factory=Counter)
    controlnet_runs: int = 0
    feature_bytes: int = 0

    def add_group(self, step: int, stop: int, features: Mapping[str, Tensor], planned: bool) -> None:
        self.groups.append((step, stop))
        if not planned:
            self.forced.append(step)
        sizes = {id(tensor): tensor.numel() * tensor.element_size() for tensor in features.values()}
        self.feature_bytes = max(self.feature_bytes, sum(sizes.values()))

    def add_stock_call(self, position: Position | None, reason: str) -> None:
        known = position is not None and not position.backwards
        self.stock_calls[position.step if position and known else None, reason] += 1

    def add_decode(self, steps: int) -> None:
        self.decoder_evaluations += steps
        self.decoder_calls += 1
