"""Key steps and forecast weights from a schedule alone, by kriging along the log-SNR."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fdcompile.forecasting.fit import GramMatrix, Matrix, Weights, fitted, weights_at
from fdcompile.forecasting.noise_levels import MOST_NOISE, NoiseLevels, Vector
from fdcompile.forecasting.search import best_key_steps

LENGTH = 3.0
"""Length scale of the covariance in ``log(alpha / sigma)``, along which a UNet's output changes smoothly."""

VARIANCES: Vector = np.geomspace(1e-2, 300, 60)
"""Variances of the directions of Gaussian data that key steps are chosen for.

They reach beyond the variances of any data, because guidance amplifies.

Fitted to the bundled miniature and to the digits of ``benchmarks/testbeds``, as is `SHARES`.
"""

SHARES: Vector = VARIANCES**-0.5
"""Weight of each of `VARIANCES` in the cost of a step."""

MOST_SEARCHED = 100
"""Largest number of steps to search; of longer schedules this many are searched, as time grows with ``steps**4``."""


def covariance(log_snr: Vector) -> Matrix:
    """Returns the squared exponential covariance of the outputs at all steps, shape ``[steps, steps]``."""
    distances = log_snr[:, None] - log_snr[None]
    values: Matrix = np.exp(-((distances / LENGTH) ** 2) / 2)
    return values


def outputs(levels: NoiseLevels) -> Matrix:
    """Returns the ideal output of the UNet for each direction of Gaussian data, shape ``[steps, variances]``.

    With ``r = sigma / alpha``, the probability-flow ODE (Song et al. 2021) moves a direction of variance ``v`` along
    ``x / alpha = z * sqrt(v + r^2)`` for a fixed ``z``, here 1. So its noise is ``r / sqrt(v + r^2)``, and its clean
    latent ``v / sqrt(v + r^2)``.
    """
    ratio = np.clip(levels.ratios[:-1, None], 1 / MOST_NOISE, MOST_NOISE)
    length = np.sqrt(VARIANCES + ratio**2)
    noise, clean = ratio / length, VARIANCES / length
    values: Matrix = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": (noise - ratio * clean) / np.sqrt(1 + ratio**2),
        "flow_prediction": noise - clean,
    }[levels.prediction_type]
    return values


def choose_key_steps(
    levels: NoiseLevels, start: int, stop: int, count: int, *, recompute: bool = False
) -> tuple[tuple[int, ...], Weights]:
    """Chooses `count` key steps for a run of steps `start` to `stop` - 1, and computes the weights of these steps.

    Models the outputs of a UNet as a random function of the log-SNR with `covariance`. The weights of a step
    are the kriging weights of its two key steps, which sum to one. The cost of a step is the squared error that its
    forecast leaves in the image (`output_costs`, `feature_costs`). Dynamic programming finds the key steps of the
    least total cost. With `recompute`, part of the UNet is recomputed at every step, and features are forecast.

    Returns:
        Key steps, counted from `start`, the first one 0; and the weights, as returned by `weights_at`.
    """
    count = min(max(count, 1), stop - start)
    return _choose(tuple(levels.ratios[start : stop + 1].tolist()), levels.prediction_type, count, recompute)


def forecast_weights(levels: NoiseLevels, start: int, stop: int, key_steps: tuple[int, ...]) -> Weights:
    """Computes the weights of given `key_steps` as in `choose_key_steps`."""
    return weights_at(key_steps, fitted(_gram(levels.log_snr[start:stop])), stop - start)


def output_costs(levels: NoiseLevels, sensitivity: Vector) -> list[Matrix]:
    """Returns the squared errors that forecasts of outputs leave in the image, as for `best_key_steps`.

    It is the error of the weights in `outputs`, times what remains of it in the image, summed over `VARIANCES`. The
    last step is a key step.
    """
    output, weigh = outputs(levels), fitted(_gram(levels.log_snr))
    remains = _remains(levels, sensitivity)
    costs = []
    for key in range(len(output)):
        weights = weigh(key)
        step, before = output - output[key], output[: max(key, 1)] - output[key]
        squares = (remains * step**2).sum(1) - 2 * weights * (before @ (remains * step).T)
        cost = np.maximum(squares + weights**2 * (before**2 @ remains.T), 0.0)
        cost[:, -1] = np.inf
        costs.append(cost)
    return costs


def feature_costs(levels: NoiseLevels, sensitivity: Vector) -> list[Matrix]:
    """Returns the squared errors that reused features leave in the image, as for `best_key_steps`.

    Features change less smoothly than outputs: whatever its weights, the error of a forecast grows with the distance
    from the last key step in the log-SNR (``docs/results.md``).
    """
    places, remains = levels.log_snr, _remains(levels, sensitivity).sum(1)
    return [np.tile(remains * (places - places[key]) ** 2, (max(key, 1), 1)) for key in range(len(places))]


def _remains(levels: NoiseLevels, sensitivity: Vector) -> Matrix:
    """Share of a step's squared error that remains in the image, by variance, shape ``[steps, variances]``.

    It is the square of the step's sensitivity, times ``v / (v + r^2)``, by which the rest of the run shrinks the square
    of an error in a direction of variance ``v``, times `SHARES`.
    """
    ratio = np.minimum(levels.ratios[:-1, None], MOST_NOISE)
    remains: Matrix = sensitivity[:, None] ** 2 * SHARES * VARIANCES / (VARIANCES + ratio**2)
    return remains


@lru_cache(maxsize=64)
def _choose(
    ratios: tuple[float, ...], prediction_type: str, count: int, recompute: bool
) -> tuple[tuple[int, ...], Weights]:
    costs_of = feature_costs if recompute else output_costs
    levels = NoiseLevels(np.array(ratios), prediction_type)
    steps = len(levels.log_snr)
    if steps <= MOST_SEARCHED:
        keys = best_key_steps(costs_of(levels, levels.sensitivity), count)[-1]
    else:
        places = np.round(np.linspace(0, steps - 1, MOST_SEARCHED)).astype(int)
        coarse = NoiseLevels(levels.ratios[[*places, steps]], prediction_type)
        costs = costs_of(coarse, np.add.reduceat(levels.sensitivity, places))
        chosen = best_key_steps(costs, max(2, round(count * MOST_SEARCHED / steps)))[-1]
        spread = np.interp(np.linspace(0, 1, count), np.linspace(0, 1, len(chosen)), places[list(chosen)])
        keys = tuple(sorted(set(spread.astype(int).tolist())))
    return keys, weights_at(keys, fitted(_gram(levels.log_snr)), steps)


def _gram(log_snr: Vector) -> GramMatrix:
    gram = GramMatrix(len(log_snr))
    gram.total = covariance(log_snr)
    return gram
