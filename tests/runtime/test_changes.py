"""What changes between or within runs is followed, or makes a key step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import assert_equal, sample, small_pipe
from torch import Tensor

import fdcompile
from fdcompile import Config


def test_changed_conditioning_makes_a_key_step(pipe: Any, stock: Any) -> None:
    """From step 4 on another prompt: equal to a run whose planned key steps include 4."""

    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": tensors["prompt_embeds"].flip(1)} if step == 3 else {}

    arguments = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    fdcompile.optimize(pipe, Config(key_steps=(0, 6)))
    actual = sample(pipe, **arguments)
    report = fdcompile.explain(pipe)
    assert report.key_steps == (0, 4, 6)
    assert report.forced_key_steps == (4,)
    fdcompile.optimize(pipe, Config(key_steps=(0, 4, 6)))
    assert_equal(actual, sample(pipe, **arguments))
    fdcompile.optimize(pipe, Config(key_steps="all"))
    assert_equal(sample(pipe, **arguments), sample(stock, **arguments))


def test_conditioning_written_in_place_makes_a_key_step(pipe: Any) -> None:
    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            tensors["prompt_embeds"].mul_(0.5)
        return {}

    fdcompile.optimize(pipe, Config(key_steps=(0, 6)))
    sample(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    assert fdcompile.explain(pipe).forced_key_steps == (4,)


def test_guidance_dropped_within_a_group(pipe: Any, stock: Any) -> None:
    def drop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step != 3:
            return {}
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}

    arguments = {"callback_on_step_end": drop, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    fdcompile.optimize(pipe, Config(key_steps=(0, 6)))
    sample(pipe, batch=2, **arguments)
    assert fdcompile.explain(pipe).forced_key_steps == (4,)
    fdcompile.optimize(pipe, Config(key_steps="all"))
    assert_equal(sample(pipe, batch=2, **arguments), sample(stock, batch=2, **arguments))


def test_nothing_leaks_from_a_run_that_failed_or_was_interrupted(pipe: Any) -> None:
    def fail(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            raise KeyboardInterrupt
        return {}

    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 4
        return {}

    fdcompile.optimize(pipe, Config(key_steps=(0, 3, 7)))
    expected = sample(pipe, seed=5)
    with pytest.raises(KeyboardInterrupt):
        sample(pipe, seed=6, callback_on_step_end=fail)
    assert torch.equal(sample(pipe, seed=5), expected)
    sample(pipe, seed=6, callback_on_step_end=interrupt)
    assert torch.equal(sample(pipe, seed=5), expected)


def test_other_size_batch_and_step_count_between_runs() -> None:
    pipe, stock = fdcompile.optimize(small_pipe(), Config(key_steps="all")), small_pipe()
    for arguments in ({"height": 8, "width": 16}, {"batch": 2}, {"steps": 6}, {}):
        assert_equal(sample(pipe, **arguments), sample(stock, **arguments))


def test_weights_changed_between_runs() -> None:
    """In place (as `fuse_lora` does) and by replacement (as PEFT does)."""
    pipe, stock = fdcompile.optimize(small_pipe(), Config(key_steps="all")), small_pipe()
    sample(pipe)
    for each in (pipe, stock):
        with torch.no_grad():
            each.unet.up_blocks[1].resnets[0].conv1.weight.mul_(0.5)
    assert_equal(sample(pipe), sample(stock))
    for each in (pipe, stock):
        conv = each.unet.up_blocks[1].resnets[0].conv1
        conv.weight = torch.nn.Parameter(conv.weight.detach() * 4)
    assert_equal(sample(pipe), sample(stock))


def test_schedule_values_survive_between_runs_until_timesteps_or_weights_change(pipe: Any, stock: Any) -> None:
    fdcompile.optimize(pipe, Config(key_steps="all"))

    def schedule_runs(steps: int) -> int:
        sample(pipe, steps=steps)
        return sum(name == "schedule" for program in fdcompile.explain(pipe)._runners for name, _, _ in program.calls)

    assert [schedule_runs(steps) for steps in (4, 4, 5, 5)] == [1, 0, 1, 0]
    weights = [each.unet.time_embedding.linear_1.weight.data for each in (pipe, stock)]  # no version counter tells
    for weight in weights:
        weight.mul_(2)
    try:
        torch.testing.assert_close(sample(pipe, steps=5), sample(stock, steps=5), rtol=1e-4, atol=1e-5)
        assert schedule_runs(5) == 0
    finally:
        for weight in weights:
            weight.div_(2)


def _written(tensor: Tensor) -> None:
    tensor.data.mul_(0.5)


def _assigned(tensor: Tensor) -> None:
    tensor.data = tensor * 0.5


def _through_numpy(tensor: Tensor) -> None:
    tensor.numpy()[:] *= 0.5


def _swapped(tensor: Tensor) -> None:
    torch.utils.swap_tensors(tensor, tensor * 0.5)


@pytest.mark.parametrize("write", [_written, _assigned, _through_numpy, _swapped])
def test_conditioning_that_changes_past_any_counter_makes_a_key_step(pipe: Any, stock: Any, write: Any) -> None:
    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            write(tensors["prompt_embeds"])
        return {}

    arguments = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    fdcompile.optimize(pipe, Config(key_steps=(0, 6)))
    sample(pipe, **arguments)
    assert fdcompile.explain(pipe).forced_key_steps == (4,)
    fdcompile.optimize(pipe, Config(key_steps="all"))
    assert_equal(sample(pipe, **arguments), sample(stock, **arguments))


def test_timesteps_written_to_within_a_run(pipe: Any, stock: Any) -> None:
    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            pipe.scheduler.timesteps[4:] -= 60
        return {}

    fdcompile.optimize(pipe, Config(key_steps="all"))
    actual = sample(pipe, callback_on_step_end=change)
    assert_equal(actual, sample(stock, callback_on_step_end=change))
