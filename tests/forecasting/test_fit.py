"""Fits of one output by two others, against what plain least squares says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fdcompile.forecasting.fit import MOST_WEIGHT, GramMatrix, bounded, fitted, held, linear, weights_at

STEPS = 6


@pytest.fixture
def outputs() -> Tensor:
    """Of two calls: a walk, as a UNet's outputs are."""
    return torch.randn(2, STEPS, 4, 3, generator=torch.Generator().manual_seed(0)).cumsum(1).double()


@pytest.fixture
def products(outputs: Tensor) -> GramMatrix:
    matrix = GramMatrix(STEPS)
    for call in outputs:
        matrix.add(call)
    return matrix


def error(outputs: Tensor, step: int, key: int, before: int, weight: float) -> float:
    by_step = outputs.transpose(0, 1)
    return (by_step[step] - (1 - weight) * by_step[key] - weight * by_step[before]).norm().item()


def test_errors_are_those_of_the_combined_outputs(outputs: Tensor, products: GramMatrix) -> None:
    for weigh in (held(STEPS), fitted(products)):
        for key in range(1, STEPS):
            weights = weigh(key)
            errors = products.errors(key, weights)
            for before in range(key):
                direct = [error(outputs, step, key, before, weights[before, step]) for step in range(STEPS)]
                np.testing.assert_allclose(errors[before], direct, atol=1e-6)


def test_fitted_weights_are_the_least_squares_ones(outputs: Tensor, products: GramMatrix) -> None:
    key, before, step = 2, 1, 3
    target, change = outputs[:, step] - outputs[:, key], outputs[:, before] - outputs[:, key]
    expected = torch.linalg.lstsq(change.reshape(-1, 1), target.reshape(-1, 1)).solution.item()
    assert -2 < expected < 3
    assert fitted(products)(key)[before, step] == pytest.approx(expected)


def test_an_exact_combination_is_found() -> None:
    first, second = torch.randn(2, 10, generator=torch.Generator().manual_seed(1))
    products = GramMatrix(3)
    products.add(torch.stack([first, second, 1.75 * second - 0.75 * first]))
    assert weights_at((0, 1), fitted(products), 3)[2] == pytest.approx((1.75, -0.75), abs=1e-5)


@pytest.mark.parametrize(("ratio", "expected"), [(-9.0, -2.0), (0.5, 0.5), (9.0, 3.0)])
def test_weights_are_bounded(ratio: float, expected: float) -> None:
    weight = bounded(np.array([ratio]), np.array([1.0]))[0]
    assert weight == pytest.approx(expected)
    assert abs(1 - weight) + abs(weight) <= MOST_WEIGHT


def test_equal_key_steps_hold() -> None:
    products = GramMatrix(3)
    products.add(torch.ones(3, 5))
    assert weights_at((0, 1), fitted(products), 3)[2] == (1.0, 0.0)


def test_linear_weights_extrapolate_a_line() -> None:
    timesteps = np.array([900.0, 700.0, 600.0, 350.0])
    weights = weights_at((0, 1), linear(timesteps), 4)
    for (last, before), timestep in zip(weights[2:], timesteps[2:], strict=True):
        assert last * timesteps[1] + before * timesteps[0] == pytest.approx(timestep)
        assert last + before == pytest.approx(1)


def test_a_line_through_one_timestep_holds() -> None:
    assert weights_at((0, 1), linear(np.array([9.0, 9.0, 1.0])), 3)[2] == (1.0, 0.0)


def test_before_the_second_key_step_there_is_nothing_to_forecast(products: GramMatrix) -> None:
    weights = weights_at((0, 3), fitted(products), STEPS)
    assert weights[:4] == ((1.0, 0.0),) * 4
    assert all(before != 0 for _, before in weights[4:])
    assert weights_at((0,), fitted(products), STEPS) == ((1.0, 0.0),) * STEPS
