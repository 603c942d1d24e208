"""How much an error of a prediction moves a run, against what the scheduler itself does with one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from models import ddim

from fdcompile.planning.gains import step_gains

STEPS = 10


def scheduler_of(kind: Any, prediction_type: str = "epsilon") -> Any:
    scheduler = kind.from_config(ddim().config, prediction_type=prediction_type, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    return scheduler


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_moves_by_the_gain(prediction_type: str) -> None:
    scheduler = scheduler_of(DDIMScheduler, prediction_type)
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    gains = step_gains(scheduler)
    for step, timestep in enumerate(scheduler.timesteps[:-1]):
        signal = scheduler.alphas_cumprod[scheduler.timesteps[step + 1]].double().sqrt()
        one, other = (
            scheduler.step(torch.full_like(sample, own), timestep, sample).prev_sample / signal for own in (0.0, 1.0)
        )
        assert (other - one).abs().mean().item() == pytest.approx(gains[step], rel=1e-4)


def test_euler_moves_by_the_gain() -> None:
    scheduler = scheduler_of(EulerDiscreteScheduler)
    gains = step_gains(scheduler)
    assert gains == pytest.approx(np.abs(np.diff(scheduler.sigmas.double().numpy())))
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for step, timestep in enumerate(scheduler.timesteps):
        scheduler._step_index = step
        moved = scheduler.step(torch.ones_like(sample), timestep, sample).prev_sample - sample
        assert moved.abs().mean().item() == pytest.approx(gains[step], rel=1e-4)


def test_samplers_of_one_schedule_have_the_same_gains() -> None:
    other = scheduler_of(DPMSolverMultistepScheduler)
    assert step_gains(other)[:-1] == pytest.approx(step_gains(scheduler_of(DDIMScheduler))[:-1], rel=1e-3)


def test_without_noise_levels_that_move_every_step_counts_alike() -> None:
    scheduler = scheduler_of(HeunDiscreteScheduler)
    assert step_gains(scheduler) == pytest.approx(np.ones(2 * STEPS - 1))
