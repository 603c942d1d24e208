"""Predict a step's output from those of two others: weights that sum to one, fitted to what was recorded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]

MOST_WEIGHT = 5.0
"""Bound on ``|c_0| + |c_1|``: so much of an error in the two outputs a forecast may pass on."""

Weights = tuple[tuple[float, float], ...]
"""Of each step: ``(c_0, c_1)``, how much of the last key step's output and of the one's before."""

Weigh = Callable[[int], Matrix]
"""Of a key step: how much of the output before it (``c_1``) goes into each step, shape ``[key step before, steps]``.

The row is the key step before; the first key step, 0, has none, and one row of zeros.
"""


class GramMatrix:
    """Inner products of the outputs of all steps, summed over calls: all that a fit of one by two others needs."""

    def __init__(self, steps: int) -> None:
        self.total = np.zeros((steps, steps))

    def add(self, outputs: Tensor) -> None:
        """Adds a call's `outputs`, shape ``[steps, ...]``."""
        flat = outputs.flatten(1).double()
        self.total += (flat @ flat.T).cpu().numpy()

    def changes(self, key: int) -> tuple[Matrix, Matrix, Matrix]:
        """How the outputs differ from that of key step `key`.

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
    """Every step reads its key step's output alone."""
    return lambda key: np.zeros((max(key, 1), steps))


def linear(timesteps: Matrix) -> Weigh:
    """Every step reads the line through its two key steps at its own timestep; held where both have the same."""

    def weigh(key: int) -> Matrix:
        between = timesteps[key] - timesteps[: max(key, 1), None]
        elapsed = timesteps - timesteps[key]
        weights: Matrix = np.divide(-elapsed, between, out=np.zeros((len(between), len(elapsed))), where=between != 0)
        return weights

    return weigh


def fitted(products: GramMatrix) -> Weigh:
    """Every step reads the combination that comes closest to its own output, within `MOST_WEIGHT`."""

    def weigh(key: int) -> Matrix:
        _, before, both = products.changes(key)
        return bounded(both, before)

    return weigh


def bounded(product: Matrix, square: Matrix) -> Matrix:
    """The ``c`` that minimises ``|d - c e|^2``, with ``product = <d, e>`` and ``square = |e|^2``, in its bounds.

    With ``c_0 = 1 - c``, ``|c_0| + |c|`` is at most `MOST_WEIGHT` between these bounds; as the error is convex in
    ``c``, the nearest bound is the best.
    """
    square = np.broadcast_to(square, product.shape)
    best = np.divide(product, square, out=np.zeros(product.shape), where=square > 0)
    return np.clip(best, (1 - MOST_WEIGHT) / 2, (1 + MOST_WEIGHT) / 2)


def weights_at(key_steps: tuple[int, ...], weigh: Weigh, steps: int) -> Weights:
    """The weights of each step; ``(1, 0)`` up to the second key step.

    Those of a later key step are what the two before it would have forecast it with: not read to predict it, but to see
    how good the forecasts are.
    """
    before = np.zeros(steps)
    for last, key, stop in zip(key_steps[:-1], key_steps[1:], (*key_steps, steps)[2:], strict=True):
        before[key + 1 : stop + 1] = weigh(key)[last, key + 1 : stop + 1]
    return tuple((1 - weight, weight) for weight in before.tolist())
