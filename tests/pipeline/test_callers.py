"""Which pipeline makes a call, where several share a UNet and a scheduler."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from models import assert_equal, flat_pipe, sample

import fdcompile
from fdcompile import Config, Planned


def planned() -> Config:
    """For calls at guidance 3."""
    pipe = flat_pipe()
    pipe.scheduler.set_timesteps(10)
    timesteps = tuple(pipe.scheduler.timesteps.tolist())
    plan = Planned(timesteps, (0, 1, 4, 7), ((1.5, -0.5),) * 10, (3.0, 3.0))
    return Config.paper(plan=plan)


@pytest.mark.filterwarnings("ignore:guidance .* is outside of the plan")
def test_the_guidance_is_that_of_the_pipeline_that_calls() -> None:
    pipe = fdcompile.optimize(flat_pipe(), planned())
    other = StableDiffusionPipeline.from_pipe(pipe)
    held = {}
    for name, caller, guidance in (("first", pipe, 3.0), ("other", other, 7.5), ("first again", pipe, 3.0)):
        sample(caller, guidance=guidance)
        held[name] = any("guidance" in reason for reason in fdcompile.explain(pipe).held)
    assert held == {"first": False, "other": True, "first again": False}


@pytest.mark.filterwarnings("ignore:guidance .* is outside of the plan")
def test_a_copy_of_the_pipeline_has_its_own_guidance() -> None:
    pipe = fdcompile.optimize(flat_pipe(), planned())
    for request, guidance, expected in ((copy.copy(pipe), 7.5, True), (copy.copy(pipe), 3.0, False)):
        sample(request, guidance=guidance)
        assert any("guidance" in reason for reason in fdcompile.explain(pipe).held) == expected


class Delegating:
    """What servers put around a shared scheduler for each request."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_scheduler":
            raise AttributeError(name)
        return getattr(self._scheduler, name)


class Forwarding(Delegating):
    """One that also sets the attributes of the real one."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_scheduler":
            super().__setattr__(name, value)
        else:
            setattr(self._scheduler, name, value)


@pytest.mark.parametrize("wrapper", [Delegating, Forwarding])
@pytest.mark.parametrize("wrapped_first", [True, False])
def test_a_scheduler_that_delegates_is_followed(wrapper: type[Delegating], wrapped_first: bool) -> None:
    pipe, stock = flat_pipe(), flat_pipe()
    if not wrapped_first:
        fdcompile.optimize(pipe, Config(key_steps="all"))
    pipe.__dict__["scheduler"] = wrapper(pipe.scheduler)
    if wrapped_first:
        fdcompile.optimize(pipe, Config(key_steps="all"))
    assert_equal(sample(pipe), sample(stock))
    assert fdcompile.explain(pipe).stock_calls == 0
    fdcompile.optimize(pipe, Config(key_steps=(0, 2, 6)))
    sample(pipe)
    assert fdcompile.explain(pipe).key_steps == (0, 2, 6)
    fdcompile.restore(pipe)
    assert not {"step", "set_timesteps"} & vars(pipe.scheduler).keys()
    assert not {"step", "set_timesteps"} & vars(pipe.scheduler._scheduler).keys()
    assert_equal(sample(pipe), sample(stock))


def test_a_server_that_copies_the_pipeline_for_each_request_is_right() -> None:
    pipe, stock = fdcompile.optimize(flat_pipe(), Config(key_steps="all")), flat_pipe()
    for steps in (6, 9):
        request = copy.copy(pipe)
        request.__dict__["scheduler"] = Delegating(copy.deepcopy(stock.scheduler))
        assert_equal(sample(request, steps=steps), sample(stock, steps=steps))
    report = fdcompile.explain(pipe)
    assert report.stock_calls == 6 + 9
    (reason,) = report.stock_reasons
    assert "a pipeline with another scheduler made the call" in reason


@pytest.mark.parametrize("detached", [False, True])
def test_timesteps_that_are_written_in_place_during_a_run_are_followed(detached: bool) -> None:
    pipe, stock = fdcompile.optimize(flat_pipe(), Config(key_steps="all")), flat_pipe()

    def shift(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            with torch.no_grad():
                (pipe.scheduler.timesteps.data if detached else pipe.scheduler.timesteps)[4:] -= 60
        return {}

    for _ in range(2):
        assert_equal(sample(pipe, callback_on_step_end=shift), sample(stock, callback_on_step_end=shift))
