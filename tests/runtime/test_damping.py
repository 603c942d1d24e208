"""Damped forecasts of the whole output, against forecasting outside the UNet."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
)
from models import assert_equal, sample, small_pipe
from torch import Tensor, nn

import fdcompile
from benchmarks.testbeds import load_testbed
from fdcompile import Config
from fdcompile.forecasting.noise_levels import noise_levels
from fdcompile.forecasting.schedule import choose_key_steps
from fdcompile.measure.calls import as_images
from fdcompile.measure.metrics import psnr
from fdcompile.runtime.damping import damp, damping

pytestmark = pytest.mark.usefixtures("few_key_steps_suffice")

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
    """Stands in for a stock UNet's forward as a run with ``Config(work=WORK)`` does.

    Steps are counted from the run's first.

    Args:
        changed: steps at which the conditioning is another, so that they are key steps and forget what was before.
    """

    def __init__(self, pipe: Any, start: int = 0, changed: tuple[int, ...] = ()) -> None:
        self._forward, self._pipe, self._start, self._changed = pipe.unet.forward, pipe, start, changed
        self._step, self._factor = 0, Tensor()
        self._last: tuple[int, Tensor, Tensor | None] | None = None
        pipe.unet.forward = self

    def _plan(self) -> None:
        levels = noise_levels(self._pipe.scheduler)
        assert levels is not None
        stop = len(levels.log_snr)
        self.keys, self._weights = choose_key_steps(levels, self._start, stop, round(WORK * (stop - self._start)))

    def __call__(self, latents: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        if self._step == 0:
            self._plan()
        step, self._step = self._step, self._step + 1
        if step in self.keys or step in self._changed:
            self._begin(step, latents, self._forward(latents, *args, **kwargs | {"return_dict": False})[0])
            step = -1
        assert self._last is not None
        _, output, before = self._last
        if step == -1 or before is None:
            return (output,)
        return (output + self._factor * self._weights[step][1] * (before - output),)

    def _begin(self, step: int, latents: Tensor, output: Tensor) -> None:
        last = None if step in self._changed else self._last
        if last is None or (last[0], step) not in itertools.pairwise(self.keys):
            self._last = step, output, None
            return
        self._factor = torch.ones(len(latents), 1, 1, 1)
        if last[2] is not None:
            change = self._weights[step][1] * (last[2] - last[1])
            self._factor = damping(output - last[1], change, latents, self._pipe.guidance_scale).view(-1, 1, 1, 1)
        self._last = step, output, last[1]


def change_prompt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"prompt_embeds": tensors["prompt_embeds"].flip(1)} if step == 4 else {}


CHANGED = {"callback_on_step_end": change_prompt, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}


def check_forecasts(pipe: Any, stock: Any, start: int = 0, changed: tuple[int, ...] = (), **arguments: Any) -> None:
    outside = Outside(stock, start, changed)
    try:
        expected = sample(stock, **{"steps": STEPS, "batch": 2} | arguments)
    finally:
        del stock.unet.forward
    fdcompile.optimize(pipe, Config(work=WORK))
    assert_equal(sample(pipe, **{"steps": STEPS, "batch": 2} | arguments), expected)
    report = fdcompile.explain(pipe)
    assert (report.forced_key_steps, report.stock_calls) == (changed, 0)
    assert set(report.key_steps) == {*outside.keys, *changed}
    assert len(outside.keys) == round(WORK * report.num_steps)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_run_equals_forecasting_outside(pipe: Any, stock: Any, guidance: float) -> None:
    check_forecasts(pipe, stock, guidance=guidance)


def test_after_a_change_of_the_prompt_nothing_is_forecast_from_before(pipe: Any, stock: Any) -> None:
    check_forecasts(pipe, stock, changed=(5,), **CHANGED)


TIMESTEPS = [990, 900, 800, 500, 450, 400, 300, 250, 200, 100, 50, 10]
SIGMAS = [14.0, 11.0, 8.0, 5.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.2, 0.1]


@pytest.mark.parametrize(
    ("scheduler", "arguments"),
    [(DPMSolverMultistepScheduler, {"timesteps": TIMESTEPS}), (EulerDiscreteScheduler, {"sigmas": SIGMAS})],
)
def test_a_schedule_of_the_users_is_followed(
    pipe: Any, stock: Any, scheduler: type[Any], arguments: dict[str, Any]
) -> None:
    usual = pipe.scheduler, stock.scheduler
    for each in (pipe, stock):
        each.scheduler = scheduler.from_config(each.scheduler.config)
    try:
        check_forecasts(pipe, stock, **arguments)
    finally:
        pipe.scheduler, stock.scheduler = usual


def test_a_run_that_starts_late_has_key_steps_of_its_own() -> None:
    kind = StableDiffusionImg2ImgPipeline
    check_forecasts(small_pipe(kind), small_pipe(kind), start=2, strength=10 / 12)


def controlled_pipe() -> Any:
    base = small_pipe()
    torch.manual_seed(4)
    net = ControlNetModel.from_unet(base.unet, conditioning_channels=4)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.05)
    pipe = StableDiffusionControlNetPipeline(**base.components, controlnet=net.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_controlnet_runs_at_key_steps_only() -> None:
    pipe = controlled_pipe()
    check_forecasts(pipe, controlled_pipe(), batch=1, image=torch.ones(1, 4, 8, 8), height=8, width=8)
    report = fdcompile.explain(pipe)
    assert report.controlnet_runs == report.encoder_runs == round(WORK * STEPS)


def test_with_all_work_a_run_is_stock(pipe: Any, stock: Any) -> None:
    fdcompile.optimize(pipe, Config(work=1.0))
    assert_equal(sample(pipe), sample(stock))


@pytest.mark.parametrize("recompute", [(), fdcompile.DECODER])
def test_parallel_equals_sequential(pipe: Any, recompute: tuple[str, ...]) -> None:
    results, calls = [], []
    for most in (1, 16):
        fdcompile.optimize(pipe, Config(recompute=recompute, max_parallel_steps=most))
        results.append(sample(pipe, steps=STEPS))
        calls.append(fdcompile.explain(pipe).decoder_calls)
    assert_equal(*results)
    assert calls == [STEPS, STEPS // 2]
    levels = noise_levels(pipe.scheduler)
    assert levels is not None
    expected, _ = choose_key_steps(levels, 0, STEPS, STEPS // 2, recompute=bool(recompute))
    assert fdcompile.explain(pipe).key_steps == expected


def test_few_steps_are_all_key_steps_and_explain_says_why(pipe: Any, stock: Any) -> None:
    fdcompile.optimize(pipe)
    with pytest.warns(UserWarning, match="4 steps: every step is a key step"):
        assert_equal(sample(pipe, steps=4), sample(stock, steps=4))
    ((reason, steps),) = fdcompile.explain(pipe).held.items()
    assert reason.startswith("4 steps: every step is a key step, because reuse loses quality")
    assert steps == (0, 1, 2, 3)


def test_fresh_noise_makes_every_step_a_key_step_and_explain_says_why(pipe: Any, stock: Any) -> None:
    usual = pipe.scheduler, stock.scheduler
    for each in (pipe, stock):
        options = {"algorithm_type": "sde-dpmsolver++"}
        each.scheduler = DPMSolverMultistepScheduler.from_config(each.scheduler.config, **options)
    reason = "DPMSolverMultistepScheduler adds fresh noise at each step, which no forecast can know"
    try:
        fdcompile.optimize(pipe)
        with pytest.warns(UserWarning, match=f"key_steps='auto': {reason}, so that every step is a key step"):
            assert_equal(sample(pipe), sample(stock))
        assert fdcompile.explain(pipe).held == {reason: tuple(range(10))}
    finally:
        pipe.scheduler, stock.scheduler = usual


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, DDPMScheduler])
def test_with_noise_at_each_step_outputs_are_reused_and_move_images_less_than_fewer_steps(scheduler: Any) -> None:
    pipe = load_testbed("digits")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)

    def draw(steps: int) -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
        return as_images(pipe(list(range(8)), num_inference_steps=steps, generator=generators).images)

    expected, fewer = draw(30), draw(15)
    fdcompile.optimize(pipe)
    gain = np.median(psnr(draw(30), expected)) - np.median(psnr(fewer, expected))
    assert fdcompile.explain(pipe).encoder_runs == 15
    assert gain > 10
