"""Counts of a run, which `Report` reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fdcompile.runtime.clock import Position
from fdcompile.runtime.runner_cache import RunnerCache


@dataclass
class RunRecord:
    """Counts of one run.

    Attributes:
        start: index of the run's first step in ``scheduler.timesteps``.
        num_steps: number of steps from there on.
        ranks: number of processes that share the decoding.
        plan_notes: differences between the run and what its plan was made for.
        groups: (key step, first step after the group), in order of execution.
        forced: key steps that were not planned.
        held: (key step, reason) of groups whose features were held although a forecast is configured.
        decoded_at_most: (steps, reason) where a group was not decoded in one call; None if all were.
        stock_calls: UNet calls that ran the stock UNet, by step (None: not in the schedule) and reason.
        feature_bytes: largest size of the features held for one group.
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
        sizes = {id(tensor): tensor.nbytes for tensor in features.values()}
        self.feature_bytes = max(self.feature_bytes, sum(sizes.values()))

    def add_stock_call(self, position: Position | None, reason: str) -> None:
        known = position is not None and not position.backwards
        self.stock_calls[position.step if position and known else None, reason] += 1

    def add_decode(self, steps: int) -> None:
        self.decoder_evaluations += steps
        self.decoder_calls += 1
