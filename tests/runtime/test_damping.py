"""Damped forecasts of the whole output, against forecasting outside the UNet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import sample, small_pipe
from torch import Tensor

import fdcompile
from fdcompile import Config
from fdcompile.forecasting.noise_levels import noise_levels
from fdcompile.forecasting.schedule import plan_schedule
from fdcompile.runtime.damping import damp, damping

STEPS, WORK = 12, 0.5


def test_factor_is_the_projection_in_its_bounds() -> None:
    forecast = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    actual = forecast * torch.tensor([[0.25], [3.0], [-1.0]])
    latents = torch.arange(3.0).view(3, 1)
    assert damping(actual, forecast, latents, 7.5).tolist() == pytest.approx([0.25, 1.0, 0.0])


def test_guidance_is_applied_where_the_batch_is_stacked() -> None:
    forecast = torch.tensor([[1.0], [2.0]])
    actual = torch.tensor([[1.0], [1.5]])
    stacked, apart = torch.ones(2, 1), torch.arange(2.0).view(2, 1)
    assert damping(actual, forecast, stacked, 3.0).tolist() == pytest.approx([2.5 / 4] * 2)
    assert damping(actual, forecast, apart, 3.0).tolist() == pytest.approx([1.0, 0.75])


def test_nothing_to_forecast_holds() -> None:
    assert damping(torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2), None).tolist() == [0.0]


def test_frames_of_a_latent_share_its_factor() -> None:
    feature, before = torch.zeros(4, 1), torch.ones(4, 1)
    assert damp(feature, before, torch.tensor([0.5, 1.0])).flatten().tolist() == [0.5, 0.5, 1.0, 1.0]


class Outside:
    """Answers as a damped run with the whole output reused, from a stock UNet at key steps."""

    def __init__(self, unet: Any, pipe: Any) -> None:
        self._forward, self._pipe = unet.forward, pipe
        self._step, self._last, self._factor = 0, [], 1.0
        pipe.scheduler.set_timesteps(STEPS)
        levels = noise_levels(pipe.scheduler)
        assert levels is not None
        self.keys, self._weights = plan_schedule(levels, 0, STEPS, round(WORK * STEPS))

    def __call__(self, latents: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        step, self._step = self._step, self._step + 1
        if step in self.keys:
            output = self._forward(latents, *args, **kwargs)[0]
            if len(self._last) > 1:
                actual = output - self._last[-1]
                forecast = self._weights[step][1] * (self._last[-2] - self._last[-1])
                self._factor = damping(actual, forecast, latents, self._pipe.guidance_scale).view(-1, 1, 1, 1)
            self._last.append(output)
            return (output,)
        if len(self._last) < 2:
            return (self._last[-1],)
        return (self._last[-1] + self._factor * self._weights[step][1] * (self._last[-2] - self._last[-1]),)


def test_a_damped_run_equals_forecasting_outside() -> None:
    pipe, stock = small_pipe(), small_pipe()
    outside = Outside(stock.unet, stock)
    stock.unet.forward = outside
    fdcompile.optimize(pipe, Config(key_steps="auto", work=WORK))
    result = sample(pipe, steps=STEPS)
    assert fdcompile.explain(pipe).key_steps == outside.keys
    torch.testing.assert_close(result, sample(stock, steps=STEPS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recompute", [(), fdcompile.DECODER])
def test_parallel_equals_sequential(recompute: tuple[str, ...]) -> None:
    results = []
    for most in (1, 16):
        config = Config(key_steps="auto", recompute=recompute, max_parallel_steps=most)
        results.append(sample(fdcompile.optimize(small_pipe(), config), steps=STEPS))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_fresh_noise_and_few_steps_make_every_step_a_key_step() -> None:
    pipe = fdcompile.optimize(small_pipe(), Config(key_steps="auto"))
    sample(pipe, steps=4)
    assert fdcompile.explain(pipe).key_steps == (0, 1, 2, 3)
