"""A plan at another number of steps."""

from __future__ import annotations

import pytest

from fdcompile.forecasting.interpolate import interpolate, is_alike

PLANNED = (900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 300.0, 200.0, 100.0, 0.0)
KEYS = (0, 2, 6)
WEIGHTS = tuple((1 - weight, weight) for weight in (0, 0, 9, -0.5, -1.0, -1.5, 9, -0.2, -0.4, -0.6))
"""9: of key steps, which are not read."""


def test_the_same_schedule_has_the_same_plan() -> None:
    keys, weights = interpolate(PLANNED, KEYS, WEIGHTS, PLANNED)
    assert keys == KEYS
    assert weights is not None
    assert [pair[1] for pair in weights] == pytest.approx([0, 0, 0, -0.5, -1.0, -1.5, 0, -0.2, -0.4, -0.6])


def test_key_steps_are_the_nearest_and_weights_lie_between_those_of_their_group() -> None:
    keys, weights = interpolate(PLANNED, KEYS, WEIGHTS, (900.0, 720.0, 550.0, 380.0, 310.0, 150.0, 0.0))
    assert keys == (0, 1, 4)
    assert weights is not None
    assert [pair[1] for pair in weights] == pytest.approx([0, 0, -0.75, -1.5, 0, -0.3, -0.6]), "at 380 that of 400"
    assert all(sum(pair) == pytest.approx(1) for pair in weights)


def test_key_steps_that_are_nearest_to_one_step_become_one() -> None:
    assert interpolate(PLANNED, (0, 1, 2, 3), None, (900.0, 640.0, 300.0, 0.0)) == ((0, 1), None)


@pytest.mark.parametrize(
    ("timesteps", "expected"),
    [
        (PLANNED, True),
        ((880.0, 600.0, 300.0, 10.0), True),
        ((900.0, 400.0, 0.0), False),  # too few
        (tuple(range(900, -1, -50)), False),  # too many
        ((700.0, 400.0, 200.0, 0.0), False),  # another range
        ((900.0, 600.0, 600.0, 0.0), False),  # as Heun's
        ((0.0, 300.0, 600.0, 900.0), False),
    ],
)
def test_which_schedules_are_alike(timesteps: tuple[float, ...], expected: bool) -> None:
    assert is_alike(PLANNED, timesteps) == expected
