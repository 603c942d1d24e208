"""How much an error of a prediction moves a run, against what the scheduler itself does with one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from models import ddim

from fdcompile.forecasting.noise_levels import step_sensitivity

STEPS = 10


def scheduler_of(kind: Any, prediction_type: str = "epsilon") -> Any:
    scheduler = kind.from_config(ddim().config, prediction_type=prediction_type, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    return scheduler


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_moves_by_the_sensitivity(prediction_type: str) -> None:
    scheduler = scheduler_of(DDIMScheduler, prediction_type)
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    sensitivity = step_sensitivity(scheduler)
    for step, timestep in enumerate(scheduler.timesteps[:-1]):
        signal = scheduler.alphas_cumprod[scheduler.timesteps[step + 1]].double().sqrt()
        one, other = (
            scheduler.step(torch.full_like(sample, value), timestep, sample).prev_sample / signal
            for value in (0.0, 1.0)
        )
        assert (other - one).abs().mean().item() == pytest.approx(sensitivity[step], rel=1e-4)


def test_euler_moves_by_the_sensitivity() -> None:
    scheduler = scheduler_of(EulerDiscreteScheduler)
    sensitivity = step_sensitivity(scheduler)
    assert sensitivity == pytest.approx(np.abs(np.diff(scheduler.sigmas.double().numpy())))
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for step, timestep in enumerate(scheduler.timesteps):
        scheduler._step_index = step
        moved = scheduler.step(torch.ones_like(sample), timestep, sample).prev_sample - sample
        assert moved.abs().mean().item() == pytest.approx(sensitivity[step], rel=1e-4)


def test_samplers_of_one_schedule_have_the_same_sensitivity() -> None:
    other = scheduler_of(DPMSolverMultistepScheduler)
    assert step_sensitivity(other)[:-1] == pytest.approx(step_sensitivity(scheduler_of(DDIMScheduler))[:-1], rel=1e-3)


def test_evaluations_of_one_level_share_its_moves() -> None:
    """Heun's method takes the mean of two evaluations, of which one is at the level where the step ends."""
    scheduler = scheduler_of(HeunDiscreteScheduler)
    moved = np.abs(np.diff(scheduler.sigmas.double().numpy()))
    assert step_sensitivity(scheduler)[1:] == pytest.approx((moved[1:] + moved[:-1]) / 2)


def test_a_scheduler_that_says_nothing_counts_every_step_alike() -> None:
    assert step_sensitivity(SimpleNamespace(timesteps=torch.arange(4))) == pytest.approx(np.ones(4))
