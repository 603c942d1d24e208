"""The dynamic programme, against trying every choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fdcompile.forecasting.search import best_key_steps

STEPS = 8


def total(costs: list[np.ndarray], keys: tuple[int, ...]) -> float:
    """Cost of all groups of `keys`, added up one by one."""
    befores, stops = (0, *keys[:-1]), (*keys[1:], len(costs))
    groups = zip(befores, keys, stops, strict=True)
    return sum(costs[key][before, step] for before, key, stop in groups for step in range(key + 1, stop))


@pytest.mark.parametrize("seed", range(4))
def test_it_finds_the_cheapest_of_all_choices(seed: int) -> None:
    random = np.random.default_rng(seed)
    costs = [random.random((max(key, 1), STEPS)) for key in range(STEPS)]
    chosen = best_key_steps(costs, STEPS)
    for count, keys in enumerate(chosen, start=1):
        choices = [(0, *rest) for rest in itertools.combinations(range(1, STEPS), count - 1)]
        assert keys == min(choices, key=lambda choice: total(costs, choice))


def test_key_steps_gather_where_steps_are_dear() -> None:
    """Each step costs its distance from its key step, and ten times that in the second half."""
    dear = np.where(np.arange(STEPS) < STEPS // 2, 1.0, 10.0)
    costs = [np.tile(dear * (np.arange(STEPS) - key), (max(key, 1), 1)) for key in range(STEPS)]
    assert best_key_steps(costs, 4)[3] == (0, 4, 5, 6)
