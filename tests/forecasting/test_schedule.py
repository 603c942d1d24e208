"""Key steps and weights from noise levels alone, against kriging and the search written out."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from models import ddim

from fdcompile.forecasting.noise_levels import NoiseLevels, fresh_noise, noise_levels
from fdcompile.forecasting.schedule import (
    LENGTH,
    SHARES,
    VARIANCES,
    choose_key_steps,
    covariance,
    forecast_weights,
    outputs,
)

STEPS = 12


def levels_of(kind: Any = DDIMScheduler, steps: int = STEPS, **options: Any) -> NoiseLevels:
    scheduler = kind.from_config(ddim().config, timestep_spacing="trailing", **options)
    scheduler.set_timesteps(steps)
    levels = noise_levels(scheduler)
    assert levels is not None
    return levels


def test_weights_are_ordinary_kriging() -> None:
    """The system with a Lagrange multiplier, as textbooks have it, solved directly."""
    levels, keys = levels_of(), (0, 3, 6)
    places, weights = levels.log_snr, forecast_weights(levels, 0, STEPS, keys)
    for step in (7, 9, 11):
        near = np.array([6, 3])
        system = np.ones((3, 3))
        system[:2, :2], system[2, 2] = covariance(places[near]), 0
        right = np.append(np.exp(-(((places[near] - places[step]) / LENGTH) ** 2) / 2), 1)
        assert weights[step] == pytest.approx(np.linalg.solve(system, right)[:2], rel=1e-5)
    assert weights[:4] == ((1.0, 0.0),) * 4, "up to the second key step"
    assert weights[6][1] < 0, "what would have forecast the third"


def test_key_steps_leave_the_least_error_in_gaussian_data() -> None:
    levels = levels_of(steps=8)
    output, ratios = outputs(levels), levels.ratios

    def cost(keys: tuple[int, ...]) -> float:
        total = 0.0
        weights = forecast_weights(levels, 0, 8, keys)
        for step in range(8):
            last = max(key for key in keys if key <= step)
            if step == last:
                continue
            before = max([key for key in keys if key < last], default=last)
            error = output[step] - weights[step][0] * output[last] - weights[step][1] * output[before]
            remains = levels.sensitivity[step] * error * np.sqrt(VARIANCES / (VARIANCES + ratios[step] ** 2))
            total += (SHARES * remains**2).sum()
        return total

    keys, _ = choose_key_steps(levels, 0, 8, 4)
    every = [(0, *rest, 7) for rest in itertools.combinations(range(1, 7), 2)]
    assert cost(keys) == pytest.approx(min(map(cost, every)), rel=1e-6)


def test_key_steps_of_features_are_close_where_errors_remain() -> None:
    """The error of a forecast grows with the distance in the log-SNR, whatever its weights."""
    levels = levels_of(steps=8)
    shrinks = (SHARES * VARIANCES / (VARIANCES + levels.ratios[:-1, None] ** 2)).sum(1)

    def cost(keys: tuple[int, ...]) -> float:
        distance = [levels.log_snr[step] - levels.log_snr[max(k for k in keys if k <= step)] for step in range(8)]
        return float((levels.sensitivity**2 * shrinks * np.square(distance)).sum())

    keys, weights = choose_key_steps(levels, 0, 8, 4, recompute=True)
    every = [(0, *rest) for rest in itertools.combinations(range(1, 8), 3)]
    assert cost(keys) == pytest.approx(min(map(cost, every)), rel=1e-6)
    assert keys != choose_key_steps(levels, 0, 8, 4)[0]
    assert weights == forecast_weights(levels, 0, 8, keys)


@pytest.mark.parametrize(
    ("prediction_type", "of"),
    [
        ("epsilon", lambda noise, clean, alpha, sigma: noise),
        ("sample", lambda noise, clean, alpha, sigma: clean),
        ("v_prediction", lambda noise, clean, alpha, sigma: alpha * noise - sigma * clean),
        ("flow_prediction", lambda noise, clean, alpha, sigma: noise - clean),
    ],
)
def test_outputs_are_those_of_gaussian_data(prediction_type: str, of: Any) -> None:
    """The posterior mean of the clean latent given ``x = alpha * clean + sigma * noise``, on the ODE's trajectory."""
    ratios = np.array([3.0, 0.5, 0.0])
    values = outputs(NoiseLevels(ratios, prediction_type))
    for ratio, row in zip(ratios, values, strict=False):
        alpha = 1 / np.sqrt(1 + ratio**2)
        sigma = ratio * alpha
        latent = alpha * np.sqrt(VARIANCES + ratio**2)
        clean = alpha * VARIANCES * latent / (alpha**2 * VARIANCES + sigma**2)
        noise = (latent - alpha * clean) / sigma
        assert row == pytest.approx(of(noise, clean, alpha, sigma))


@pytest.mark.parametrize("count", [1, 5, STEPS])
def test_there_are_as_many_as_asked_for(count: int) -> None:
    keys, weights = choose_key_steps(levels_of(), 0, STEPS, count)
    assert len(keys) == count
    assert len(weights) == STEPS


def test_a_late_start_is_planned_from_there() -> None:
    whole = levels_of()
    late = NoiseLevels(whole.ratios[4:], whole.prediction_type)
    assert choose_key_steps(whole, 4, STEPS, 4) == choose_key_steps(late, 0, STEPS - 4, 4)


def test_long_schedules_have_the_key_steps_of_short_ones() -> None:
    """Where in the schedule they lie, as shares of it."""
    one, other = (choose_key_steps(levels_of(steps=steps), 0, steps, steps // 10)[0] for steps in (100, 500))
    assert len(other) == 50
    coarse = [other[round(place * 49 / 9)] / 500 for place in range(10)]
    assert coarse == pytest.approx([key / 100 for key in one], abs=0.1)


def test_samplers_of_one_schedule_have_the_same_key_steps() -> None:
    plans = [choose_key_steps(levels_of(kind), 0, STEPS, 5)[0] for kind in (DDIMScheduler, EulerDiscreteScheduler)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("options", [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}])
def test_spaced_sigmas_are_seen(options: dict[str, bool]) -> None:
    levels = levels_of(EulerDiscreteScheduler, **options)
    assert (np.diff(levels.log_snr) > 0).all()
    assert not np.allclose(levels.log_snr, levels_of(EulerDiscreteScheduler).log_snr, atol=0.1)


def test_flow_matching_levels() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    levels = noise_levels(scheduler)
    assert levels is not None and levels.prediction_type == "flow_prediction"
    sigmas = scheduler.sigmas.double().numpy()[1:4]
    assert levels.log_snr[1:] == pytest.approx(np.log((1 - sigmas) / sigmas))
    assert np.isfinite(levels.sensitivity).all()


def test_no_signal_at_the_first_step() -> None:
    levels = levels_of(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert np.isfinite(levels.log_snr).all() and np.isfinite(levels.sensitivity).all()


def test_a_scheduler_that_says_nothing() -> None:
    class Silent:
        timesteps = torch.arange(4)

    assert noise_levels(Silent()) is None


def test_fresh_noise_is_told_by_the_scheduler() -> None:
    assert fresh_noise(EulerAncestralDiscreteScheduler())
    assert fresh_noise(DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"))
    assert not fresh_noise(DPMSolverMultistepScheduler())
