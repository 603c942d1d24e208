"""Key steps and forecast weights from a schedule alone, without a recording: kriging along the log-SNR."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fdcompile.forecasting.fit import GramMatrix, Matrix, Weights, fitted, weights_at
from fdcompile.forecasting.noise_levels import NoiseLevels, Vector
from fdcompile.forecasting.search import best_key_steps

LENGTH = 3.0
"""Length of the covariance in ``log(alpha / sigma)``, in which a UNet's output changes smoothly."""

CONTRACTION = 2.0
"""At a noise level ``sigma / alpha`` of this, the rest of the run halves the square of an error."""

MOST_SEARCHED = 100
"""Schedules of more steps are searched at so many of them: the search takes time with the fourth power."""


def covariance(log_snr: Vector, length: float = LENGTH) -> Matrix:
    """Squared exponential covariance of the outputs at all steps, shape ``[steps, steps]``."""
    distances = log_snr[:, None] - log_snr[None]
    values: Matrix = np.exp(-((distances / length) ** 2) / 2)
    return values


def plan_schedule(levels: NoiseLevels, start: int, stop: int, count: int) -> tuple[tuple[int, ...], Weights]:
    """The best `count` key steps of a run of steps `start` to `stop` - 1, and the weights of these steps.

    The outputs of a UNet are taken for a random function of the log-SNR with the covariance above. Each step's weights
    are the kriging weights of its two key steps, which sum to one. A step costs the square of its
    kriging error times its sensitivity, less what the rest of the run makes of an early error: a denoiser draws
    samples together. A dynamic programme finds the key steps of the least total.

    Returns:
        Key steps, counted from `start`, the first one 0; and the weights as `weights_at` has them.
    """
    sensitivity = levels.sensitivity / np.sqrt(1 + (levels.ratios[:-1] / CONTRACTION) ** 2)
    log_snr, sensitivity = levels.log_snr[start:stop], sensitivity[start:stop]
    return _plan(tuple(log_snr.tolist()), tuple(sensitivity.tolist()), min(max(count, 1), stop - start))


def weigh_schedule(levels: NoiseLevels, start: int, stop: int, key_steps: tuple[int, ...]) -> Weights:
    """The weights for given `key_steps`, as in `plan_schedule`."""
    return weights_at(key_steps, fitted(_gram(levels.log_snr[start:stop])), stop - start)


@lru_cache(maxsize=64)
def _plan(log_snr: tuple[float, ...], sensitivity: tuple[float, ...], count: int) -> tuple[tuple[int, ...], Weights]:
    steps = len(log_snr)
    if steps <= MOST_SEARCHED:
        keys = _search(np.array(log_snr), np.array(sensitivity), count)
    else:
        places = np.round(np.linspace(0, steps - 1, MOST_SEARCHED)).astype(int)
        sums = np.add.reduceat(np.array(sensitivity), places)
        coarse = _search(np.array(log_snr)[places], sums, max(2, round(count * MOST_SEARCHED / steps)))
        knots = np.append(places[list(coarse)], steps)
        spread = np.interp(np.arange(count) / count, np.linspace(0, 1, len(knots)), knots)
        keys = tuple(sorted(set(spread.astype(int).tolist())))
    return keys, weights_at(keys, fitted(_gram(np.array(log_snr))), steps)


def _search(log_snr: Vector, sensitivity: Vector, count: int) -> tuple[int, ...]:
    gram = _gram(log_snr)
    weigh = fitted(gram)
    costs = [(sensitivity * gram.errors(key, weigh(key))) ** 2 for key in range(len(log_snr))]
    return best_key_steps(costs, count)[-1]


def _gram(log_snr: Vector) -> GramMatrix:
    gram = GramMatrix(len(log_snr))
    gram.total = covariance(log_snr)
    return gram
