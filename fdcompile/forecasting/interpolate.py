"""Interpolates the plan of one schedule to another number of steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fdcompile.forecasting.fit import Weights

FEWEST, MOST = 0.4, 1.5
"""Range of steps that a plan is interpolated to, as shares of its own steps: the range measured in docs/planning.md."""

TOLERANCE = 0.1
"""Largest difference of the first and the last timestep from the plan's, as a share of the plan's range."""


def is_alike(planned: Sequence[float], timesteps: Sequence[float]) -> bool:
    """Returns whether two schedules cover the same range of timesteps with similar numbers of steps."""
    if not FEWEST <= len(timesteps) / len(planned) <= MOST:
        return False
    if any(later >= earlier for steps in (planned, timesteps) for earlier, later in itertools.pairwise(steps)):
        return False
    most = TOLERANCE * (planned[0] - planned[-1])
    return abs(planned[0] - timesteps[0]) <= most and abs(planned[-1] - timesteps[-1]) <= most


@lru_cache(maxsize=64)
def interpolate(
    planned: tuple[float, ...], key_steps: tuple[int, ...], weights: Weights | None, timesteps: tuple[float, ...]
) -> tuple[tuple[int, ...], Weights | None]:
    """Converts key steps and weights of a run along `planned` to a run along `timesteps`.

    The steps nearest to the planned key steps become key steps: as many, or fewer where two planned key steps are
    nearest to the same step. The weights of the other steps are interpolated linearly in the timestep within the
    planned group.
    """
    places, levels = np.array(timesteps), np.array(planned)
    nearest = {int(np.abs(places - levels[key]).argmin()): key for key in key_steps} | {0: 0}
    keys = tuple(sorted(nearest))
    if weights is None:
        return keys, None
    interpolated = [(1.0, 0.0)] * len(timesteps)
    for key, stop in itertools.pairwise((*keys, len(timesteps))):
        first = nearest[key]
        last = min((other for other in key_steps if other > first), default=len(planned))
        before = [0.0, *(weights[step][1] for step in range(first + 1, last))]
        for step in range(key + 1, stop):
            weight = float(np.interp(-places[step], -levels[first:last], before))
            interpolated[step] = (1 - weight, weight)
    return keys, tuple(interpolated)
