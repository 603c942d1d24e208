"""Predicts a step's output from the outputs of two other steps, with weights that sum to one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]

MOST_WEIGHT = 5.0
"""Bound on ``|c_0| + |c_1|``, and so on the amplification of errors in the two outputs."""

Weights = tuple[tuple[float, float], ...]
"""Weights ``(c_0, c_1)`` of each step, for the outputs of the last key step and of the key step before."""

Weigh = Callable[[int], Matrix]
"""Function from a key step to the weights ``c_1`` of the previous key step's output, shape ``[before, steps]``.

A row is for one choice of the previous key step. The first key step, 0, has none, and gets one row of zeros.
"""


class GramMatrix:
    """Inner products of the outputs of all steps, summed over calls; sufficient to fit one output by two others."""

    def __init__(self, steps: int) -> None:
        self.total = np.zeros((steps, steps))

    def add(self, outputs: Tensor) -> None:
        """Adds the inner products of a call's `outputs`, shape ``[steps, ...]``."""
        flat = outputs.flatten(1).double()
        self.total += (flat @ flat.T).cpu().numpy()

    def changes(self, key: int) -> tuple[Matrix, Matrix, Matrix]:
        """Inner products of the differences from the output of key step `key`.

        Returns:
            ``|F_step - F_key|^2``, shape ``[steps]``; ``|F_before - F_key|^2`` as a column, shape ``[before, 1]``; and
            the product of the two differences, shape ``[before, steps]``.
        """
        with_key, before = self.total[key], slice(0, max(key, 1))
        squares = np.diag(self.total) - 2 * with_key + with_key[key]
        products = self.total[before] - with_key - with_key[before, None] + with_key[key]
        return squares, squares[before, None], products

    def errors(self, key: int, weights: Matrix) -> Matrix:
        """``|F_step - (1 - c) F_key - c F_before|`` for ``c = weights``, shape ``[before, steps]``."""
        step, before, both = self.changes(key)
        squares: Matrix = step - 2 * weights * both + weights**2 * before
        return np.sqrt(np.maximum(squares, 0.0))


def held(steps: int) -> Weigh:
    """Returns zero weights: each step reuses the output of its key step."""
    return lambda key: np.zeros((max(key, 1), steps))


def linear(timesteps: Matrix) -> Weigh:
    """Returns the weights of linear extrapolation in the timestep; zero where both key steps have the same timestep."""

    def weigh(key: int) -> Matrix:
        between = timesteps[key] - timesteps[: max(key, 1), None]
        elapsed = timesteps - timesteps[key]
        weights: Matrix = np.divide(-elapsed, between, out=np.zeros((len(between), len(elapsed))), where=between != 0)
        return weights

    return weigh


def fitted(products: GramMatrix) -> Weigh:
    """Returns the least-squares weights for each step's own output, within `MOST_WEIGHT`."""

    def weigh(key: int) -> Matrix:
        _, before, both = products.changes(key)
        return bounded(both, before)

    return weigh


def bounded(product: Matrix, square: Matrix) -> Matrix:
    """Returns the bounded ``c`` that minimizes ``|d - c e|^2``, with ``product = <d, e>`` and ``square = |e|^2``.

    The bounds keep ``|c_0| + |c|`` at most `MOST_WEIGHT`, with ``c_0 = 1 - c``. The error is convex in ``c``, so
    clipping to the nearest bound is optimal.
    """
    square = np.broadcast_to(square, product.shape)
    best = np.divide(product, square, out=np.zeros(product.shape), where=square > 0)
    return np.clip(best, (1 - MOST_WEIGHT) / 2, (1 + MOST_WEIGHT) / 2)


def weights_at(key_steps: tuple[int, ...], weigh: Weigh, steps: int) -> Weights:
    """Returns the weights of each step; ``(1, 0)`` up to the second key step.

    A later key step has the weights with which the two key steps before it would have forecast it. They are not used
    for its prediction, but to assess the forecast (damping).
    """
    before = np.zeros(steps)
    for last, key, stop in zip(key_steps[:-1], key_steps[1:], (*key_steps, steps)[2:], strict=True):
        before[key + 1 : stop + 1] = weigh(key)[last, key + 1 : stop + 1]
    return tuple((1 - weight, weight) for weight in before.tolist())
