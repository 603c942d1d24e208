"""Finds the best key steps by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fdcompile.forecasting.fit import Matrix


def best_key_steps(costs: Sequence[Matrix], most: int) -> list[tuple[int, ...]]:
    """Finds the key steps of the least total cost, for each number of key steps from 1 to `most`.

    The cost of a group depends on its key step and the one before. So this is dynamic programming over pairs of key
    steps: the best path to a pair extends the best path to one of the pairs that it can follow. Time grows with
    ``most * steps**3``, memory with ``steps**3``.

    Args:
        costs: for each key step the cost of every step in its group, shape ``[before, steps]`` as in `Weigh`.
        most: largest number of key steps.
    """
    steps = len(costs)
    # groups[key][before, stop]: cost of the steps between `key` and `stop`, the next key step or the end
    groups = [_groups(cost, key) for key, cost in enumerate(costs)]
    best = np.full((steps, steps), np.inf)  # cost of all steps before `key`, by (before, key)
    best[0, 0] = 0.0
    ways: list[NDArray[np.int_]] = []  # for each number of key steps: the key step before (key, next)
    chosen = []
    for _ in range(most):
        last = [best[: len(groups[key]), key] + groups[key][:, steps] for key in range(steps)]
        key = int(np.argmin([totals.min() for totals in last]))
        chosen.append(_walk_back(ways, int(last[key].argmin()), key))
        longer, way = np.full_like(best, np.inf), np.zeros((steps, steps), int)
        for key in range(steps - 1):
            totals = best[: len(groups[key]), key, None] + groups[key][:, key + 1 : steps]
            longer[key, key + 1 :], way[key, key + 1 :] = totals.min(0), totals.argmin(0)
        best = longer
        ways.append(way)
    return chosen


def _groups(cost: Matrix, key: int) -> Matrix:
    """Returns the cost of the steps between `key` and each end of its group, shape ``[before, steps + 1]``."""
    counted = np.where(np.arange(cost.shape[1]) > key, cost, 0.0)
    return np.concatenate([np.zeros((len(counted), 1)), counted.cumsum(1)], axis=1)


def _walk_back(ways: list[NDArray[np.int_]], before: int, key: int) -> tuple[int, ...]:
    keys = [key]
    for way in reversed(ways):
        keys.append(before)
        before, key = int(way[before, key]), before
    return tuple(reversed(keys))
