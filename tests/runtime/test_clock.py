"""Positions are read from addresses, not from values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from fdcompile.runtime.clock import Clock, Position


class Followed(Clock):
    """A clock with the scheduler that it follows."""

    def __init__(self, scheduler: SimpleNamespace) -> None:
        super().__init__()
        self.scheduler = scheduler

    def locate(self, timestep: Any, timesteps: Any = None) -> Position | None:
        return super().locate(timestep, self.scheduler.timesteps)


def clock(timesteps: torch.Tensor) -> tuple[Followed, SimpleNamespace]:
    scheduler = SimpleNamespace(timesteps=timesteps)
    return Followed(scheduler), scheduler


def test_repeated_timesteps_have_their_own_positions() -> None:
    timesteps = torch.tensor([9, 7, 7, 5, 5])
    tested, _ = clock(timesteps)
    assert [tested.locate(t).step for t in timesteps] == [0, 1, 2, 3, 4]  # type: ignore[union-attr]


def test_a_late_start_is_a_run_of_its_own() -> None:
    timesteps = torch.arange(10).flip(0)
    tested, _ = clock(timesteps)
    positions = [tested.locate(t) for t in timesteps[6:]]
    assert positions == [Position(0, 6, step, 0) for step in (6, 7, 8, 9)]


def test_several_calls_before_a_scheduler_step_have_slots_each() -> None:
    timesteps = torch.arange(3)
    tested, _ = clock(timesteps)
    slots = []
    for t in timesteps:
        slots += [tested.locate(t).slot, tested.locate(t).slot]  # type: ignore[union-attr]
        tested.scheduler_stepped()
    assert slots == [0, 1] * 3


def test_what_steps_twice_at_a_step_is_ambiguous_until_the_schedule_begins_anew() -> None:
    timesteps = torch.arange(3)
    tested, _ = clock(timesteps)
    positions = []
    for t in (*timesteps.repeat_interleave(2).tolist(), 0, 1):
        positions.append(tested.locate(timesteps[t]))
        tested.scheduler_stepped()
    ambiguous = [Position(1, 0, step, 0, ambiguous=True) for step in (0, 1, 1, 2, 2)]
    assert positions == [Position(0, 0, 0, 0), *ambiguous, Position(2, 0, 0, 0), Position(2, 0, 1, 0)]


def test_an_element_of_the_tensor_before_counts_while_both_are_equal() -> None:
    tested, scheduler = clock(torch.arange(5))
    before = scheduler.timesteps
    assert tested.locate(before[1]) == Position(0, 1, 1, 0)
    scheduler.timesteps = before.clone()
    assert tested.locate(before[2]) == Position(0, 1, 2, 0)
    assert tested.schedule_of(before[2], scheduler.timesteps) is before
    scheduler.timesteps = before + 1
    assert tested.locate(before[3]) is None
    scheduler.timesteps = before.clone()
    assert tested.locate(scheduler.timesteps[3]) == Position(1, 3, 3, 0)
    assert tested.locate(before[4]) is None, "it is not the one that was followed last"


def test_what_was_a_copy_of_one_schedule_is_none_of_the_next() -> None:
    tested, scheduler = clock(torch.arange(5))
    first, copy = scheduler.timesteps, torch.arange(5)
    tested.locate(first[0])
    scheduler.timesteps = copy
    assert tested.locate(first[1]) == Position(0, 0, 1, 0)
    scheduler.timesteps = second = torch.arange(5) * 2
    assert tested.locate(second[0]) == Position(1, 0, 0, 0)
    scheduler.timesteps = copy
    assert tested.locate(second[1]) is None


def test_a_new_schedule_is_a_new_run_even_at_the_following_step() -> None:
    tested, scheduler = clock(torch.arange(3))
    tested.locate(scheduler.timesteps[0])
    scheduler.timesteps = scheduler.timesteps.clone()
    assert tested.locate(scheduler.timesteps[1]) == Position(1, 1, 1, 0)


def test_an_expanded_element_is_located() -> None:
    timesteps = torch.arange(5)
    tested, _ = clock(timesteps)
    assert tested.locate(timesteps[3].expand(4)) == Position(0, 3, 3, 0)
    assert tested.locate(timesteps[4][None]) == Position(0, 3, 4, 0)


def test_equal_values_from_elsewhere_have_no_position() -> None:
    timesteps = torch.arange(5)
    tested, _ = clock(timesteps)
    for timestep in (3, 3.0, torch.tensor(3), timesteps[3].clone(), timesteps[2:4], timesteps[3].float()):
        assert tested.locate(timestep) is None


@given(st.lists(st.integers(0, 3), min_size=2, max_size=8), st.integers(1, 3))
def test_any_values_and_strides(values: list[int], stride: int) -> None:
    timesteps = torch.tensor(values).repeat_interleave(stride)[::stride]
    tested, _ = clock(timesteps)
    assert [tested.locate(t).step for t in timesteps] == list(range(len(values)))  # type: ignore[union-attr]
