"""Weights fitted to the runs that they lead to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from calls import call
from models import assert_equal, small_pipe
from torch import Tensor

import fdcompile
from fdcompile.config import Config, Planned
from fdcompile.measure.calls import run_call
from fdcompile.planning.refit import PlannedRuns, refit
from fdcompile.runtime.clock import Position

STEPS = 6
KEY_STEPS = (0, 1, 3)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return small_pipe()


def follow(pipe: Any, seed: int) -> tuple[PlannedRuns, Tensor]:
    """A run that is refitted, and its latents."""
    runs = PlannedRuns(frozenset(KEY_STEPS), STEPS)
    return runs, run_call(pipe, call(seed, STEPS), runs.output_hook).latents


def test_the_run_that_is_fitted_is_the_one_that_its_weights_make(pipe: Any) -> None:
    runs, latents = follow(pipe, seed=0)
    assert any(before for _, before in runs.weights)
    planned = Planned(tuple(pipe.scheduler.timesteps.tolist()), KEY_STEPS, runs.weights, None)
    fdcompile.optimize(pipe, Config.paper(plan=planned, recompute=()))
    try:
        assert_equal(run_call(pipe, call(0, STEPS)).latents, latents)
        assert fdcompile.explain(pipe).encoder_runs == len(KEY_STEPS)
    finally:
        fdcompile.restore(pipe)


def test_weights_stand_at_steps_after_the_second_key_step_only(pipe: Any) -> None:
    weights = follow(pipe, seed=1)[0].weights
    assert [before != 0 for _, before in weights] == [False, False, True, False, True, True]


def test_all_calls_count_alike(pipe: Any) -> None:
    """The same call twice weighs as once; another beside it changes the fit."""
    once = refit(pipe, [call(0, STEPS)], KEY_STEPS, STEPS)
    twice = refit(pipe, [call(0, STEPS)] * 2, KEY_STEPS, STEPS)
    both = refit(pipe, [call(0, STEPS), call(1, STEPS)], KEY_STEPS, STEPS)
    np.testing.assert_allclose(twice, once, atol=1e-5)
    assert np.abs(np.subtract(both, once)).max() > 1e-3


def test_each_step_is_fitted_to_what_the_unet_says_on_the_planned_path() -> None:
    """Two outputs, and steps that are exact combinations of them: 1.5 and -0.5, then out of bounds."""
    runs = PlannedRuns(frozenset((0, 1)), 4)
    first, second = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).double()
    wanted = 1.5 * second - 0.5 * first
    assert runs.output_hook(Position(0, 0, 0, 0), first) is first
    assert runs.output_hook(Position(0, 0, 1, 0), second) is second
    torch.testing.assert_close(runs.output_hook(Position(0, 0, 2, 0), wanted), wanted)
    torch.testing.assert_close(runs.output_hook(Position(0, 0, 3, 0), 9 * second - 8 * first), 3 * second - 2 * first)
    np.testing.assert_allclose(runs.weights[2:], ((1.5, -0.5), (3.0, -2.0)))


def test_runs_and_lanes_do_not_see_each_other() -> None:
    runs = PlannedRuns(frozenset((0, 2)), 4)
    outputs = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    for slot, output in enumerate(outputs):
        runs.output_hook(Position(0, 0, 0, slot), output)
    for slot, output in enumerate(outputs):
        assert torch.equal(runs.output_hook(Position(0, 0, 1, slot), torch.zeros(8)), output)
    first = torch.ones(8)  # img2img: the first step that is run is a key step
    assert runs.output_hook(Position(1, 1, 1, 0), first) is first
    assert torch.equal(runs.output_hook(Position(1, 1, 2, 0), outputs[0]), outputs[0])
