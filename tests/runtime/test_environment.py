"""What surrounds a call: autocast, threads, torch.compile, arguments, inversions, channels beside the latent."""

from __future__ import annotations

import copy
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
from models import FLAT, TEXT, assert_equal, flat_pipe, sample, small_unet, small_xl_pipe
from torch import Tensor

import fdcompile
from fdcompile import Config
from fdcompile.capture.guards import TensorGuard

ALL = Config(key_steps="all")


def draw(pipe: Any, **arguments: Any) -> Tensor:
    return sample(pipe, **{"steps": 6, **arguments})


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return fdcompile.optimize(flat_pipe(), ALL), flat_pipe()


@pytest.mark.parametrize("build", [flat_pipe, pytest.param(small_xl_pipe, marks=pytest.mark.tables)])
def test_autocast_is_part_of_what_a_graph_is_for(build: Any) -> None:
    """In bfloat16 the images agree as far as its rounding lets them; without, as ever."""
    pipe, twin = fdcompile.optimize(build(), ALL), build()
    for autocast in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its stages run step by step
            actual, expected = (sample(each, steps=2) for each in (pipe, twin))
        if autocast:
            assert (actual - expected).abs().max() < 0.05 * expected.abs().max()
        else:
            assert_equal(actual, expected)


def test_threads_that_share_a_unet(pair: tuple[Any, Any]) -> None:
    """The usual recipe of a server: each a pipe of its own, with a scheduler of its own. One or all are optimized."""
    _, twin = pair
    expected = [draw(twin, seed=seed) for seed in range(3)]
    parts = flat_pipe().components
    for count in (1, 3):
        pipes = []
        for _ in range(3):
            components = {**parts, "scheduler": copy.deepcopy(parts["scheduler"])}
            pipes.append(StableDiffusionPipeline(**components, requires_safety_checker=False))
            pipes[-1].set_progress_bar_config(disable=True)
        for pipe in pipes[:count]:
            fdcompile.optimize(pipe, ALL)

        def work(index: int, pipes: Any = pipes) -> list[Tensor]:
            return [draw(pipes[index], seed=index) for _ in range(2)]

        with ThreadPoolExecutor(3) as threads:
            for actual, latents in zip(threads.map(work, range(3)), expected, strict=True):
                for image in actual:
                    assert_equal(image, latents)
        for pipe in pipes[:count]:
            if count == 3:
                assert fdcompile.explain(pipe).stock_reasons == {}
            fdcompile.restore(pipe)


def test_a_unet_that_is_compiled_afterwards_runs_optimized(pair: tuple[Any, Any]) -> None:
    pipe, twin = pair
    unet = pipe.unet
    pipe.unet = torch.compile(unet)
    try:
        assert_equal(draw(pipe), draw(twin))
        report = fdcompile.explain(pipe)
        assert (report.encoder_runs, report.stock_calls) == (6, 0)
    finally:
        pipe.unet = unet
        fdcompile.optimize(pipe, ALL)


@pytest.mark.parametrize("value", [np.ones(2), {1, 2}, object(), print], ids=lambda value: type(value).__name__)
def test_arguments_that_no_graph_can_stand_for(pair: tuple[Any, Any], value: Any) -> None:
    pipe, twin = pair
    assert torch.equal(
        draw(pipe, cross_attention_kwargs={"own": value}), draw(twin, cross_attention_kwargs={"own": value})
    )
    (reason,) = fdcompile.explain(pipe).stock_reasons
    assert reason.startswith(f"cross_attention_kwargs.own, a {type(value).__name__}")


def test_an_inversion_runs_stock_and_says_so(pair: tuple[Any, Any]) -> None:
    def invert(pipe: Any) -> Tensor:
        text = torch.randn(1, *TEXT, generator=torch.Generator().manual_seed(4))
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        pipe.scheduler.set_timesteps(20)
        with torch.no_grad():
            for index in reversed(range(20)):
                t = pipe.scheduler.timesteps[index]
                latents = latents + 0.01 * pipe.unet(latents, t, encoder_hidden_states=text).sample
        return latents

    pipe, twin = pair
    fdcompile.optimize(pipe)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_equal(invert(pipe), invert(twin))
    assert sum("key step" in str(warning.message) for warning in caught) <= 1
    report = fdcompile.explain(pipe)
    assert (report.num_steps, report.encoder_runs, report.stock_calls) == (1, 1, 19)
    assert list(report.stock_reasons) == ["the timesteps run backwards, as in an inversion"]
    draw(pipe)
    assert fdcompile.explain(pipe).stock_reasons == {}


@pytest.fixture(params=["on a CPU", "as on an accelerator"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "as on an accelerator":
        monkeypatch.setattr(TensorGuard, "compares_content", staticmethod(Tensor.is_inference))
    return str(request.param)


@pytest.fixture(scope="module")
def inpainting() -> Any:
    parts = {**flat_pipe().components, "unet": small_unet(in_channels=9, **FLAT)}
    pipe = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return fdcompile.optimize(pipe, Config(key_steps=(0,)))


def _another_mask(tensors: dict[str, Any]) -> dict[str, Any]:
    return {"mask": 1 - tensors["mask"]}


def _another_image(tensors: dict[str, Any]) -> dict[str, Any]:
    return {"masked_image_latents": tensors["masked_image_latents"].flip(-1)}


def _written_to(tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["mask"][..., 0] = 0.5
    return {}


def _a_copy(tensors: dict[str, Any]) -> dict[str, Any]:
    return {"mask": tensors["mask"].clone()}


def repainted(pipe: Any, changed: int, change: Any) -> fdcompile.Report:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    draw(
        pipe,
        image=torch.rand(1, 3, 8, 8),
        mask_image=mask,
        height=8,
        width=8,
        callback_on_step_end=lambda pipe, step, timestep, tensors: change(tensors) if step == changed else {},
        callback_on_step_end_tensor_inputs=["mask", "masked_image_latents"],
    )
    return fdcompile.explain(pipe)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("change", [_another_mask, _another_image, _written_to])
def test_a_mask_beside_the_latent_that_changes_makes_a_key_step(inpainting: Any, change: Any) -> None:
    assert repainted(inpainting, -1, change).key_steps == (0,)
    for changed in (0, 3):
        assert repainted(inpainting, changed, change).forced_key_steps == (changed + 1,)


@pytest.mark.usefixtures("device")
def test_a_mask_beside_the_latent_that_is_only_copied_makes_none(inpainting: Any) -> None:
    assert repainted(inpainting, 3, _a_copy).key_steps == (0,)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("in_place", [True, False])
def test_a_hook_that_changes_the_mask_beside_the_latent_makes_a_key_step(inpainting: Any, in_place: bool) -> None:
    """The pipeline's own tensors stay as they are."""
    calls = iter(range(6))

    def invert(unet: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if next(calls) < 3:
            return args
        sample = args[0] if in_place else args[0].clone()
        sample[:, 4] = 1 - sample[:, 4]
        return sample, *args[1:]

    handle = inpainting.unet.register_forward_pre_hook(invert)
    try:
        assert repainted(inpainting, -1, None).forced_key_steps == (3,)
    finally:
        handle.remove()


def test_calls_outside_a_schedule_are_a_record_of_their_own(pair: tuple[Any, Any]) -> None:
    pipe, _ = pair
    fdcompile.optimize(pipe, ALL)
    draw(pipe)
    assert fdcompile.explain(pipe).stock_calls == 0
    with torch.no_grad():
        for _ in range(3):
            pipe.unet(torch.randn(1, 4, 8, 8), 5, encoder_hidden_states=torch.randn(1, *TEXT))
    report = fdcompile.explain(pipe)
    assert (report.num_steps, report.encoder_runs, report.stock_calls) == (0, 0, 3)
    draw(pipe)
    assert fdcompile.explain(pipe).stock_calls == 0


def test_a_report_can_be_written_as_json(pair: tuple[Any, Any]) -> None:
    pipe, _ = pair
    fdcompile.optimize(pipe, Config(key_steps=(0, 3), max_parallel_steps=2))
    draw(pipe)
    report = fdcompile.explain(pipe)
    values = json.loads(report.to_json())
    assert values["key_steps"] == [0, 3]
    assert values["flops"] == report.flops
    assert values["stage_flops"] == report.stage_flops
    assert (values["decoder_evaluations"], values["decoder_calls"]) == (6, 4)
    assert "at most 2 at once: max_parallel_steps=2" in str(report)
