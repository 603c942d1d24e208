"""A plan used for what it was not made for: a warning, a line in explain, an error where that is asked for."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from models import flat_pipe, sample

import fdcompile
from fdcompile import Config, Planned
from fdcompile.pipeline.identity import describe_parts, digests_of

pytestmark = pytest.mark.usefixtures("few_key_steps_suffice")

STEPS = 6
GUIDANCE = 5.0


@pytest.fixture(scope="module")
def pipe() -> Any:
    return flat_pipe()


@pytest.fixture(scope="module")
def config(pipe: Any) -> Config:
    pipe.scheduler.set_timesteps(STEPS)
    weights = ((1.0, 0.0), (1.0, 0.0), (1.5, -0.5), (1.0, 0.0), (1.5, -0.5), (2.0, -1.0))
    timesteps = tuple(pipe.scheduler.timesteps.tolist())
    plan = Planned(timesteps, (0, 1, 3), weights, (GUIDANCE, GUIDANCE), made_for=digests_of(describe_parts(pipe)))
    return Config("auto", (), "auto", work=0.5, plan=plan)


@contextmanager
def fine_tuned(pipe: Any) -> Iterator[None]:
    bias = pipe.unet.conv_in.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias += 1
    try:
        yield
    finally:
        with torch.no_grad():
            bias.copy_(before)


@contextmanager
def other_scheduler(pipe: Any) -> Iterator[None]:
    scheduler = pipe.scheduler
    pipe.scheduler = DDIMScheduler.from_config(scheduler.config, set_alpha_to_one=True)
    try:
        yield
    finally:
        pipe.scheduler = scheduler


def test_what_it_was_made_for_needs_no_word(pipe: Any, config: Config) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # the second time on an optimized pipe
            fdcompile.optimize(pipe, replace(config, strict=True))
        sample(pipe, STEPS, guidance=GUIDANCE)
    report = fdcompile.explain(pipe)
    assert (report.plan_notes, report.key_steps) == ((), (0, 1, 3))


@pytest.mark.parametrize(
    ("changed", "note"),
    [(fine_tuned, "(UNet's weights differ)"), (other_scheduler, "(scheduler's configuration differ)")],
)
def test_with_another_model_it_warns_and_is_followed(pipe: Any, config: Config, changed: Any, note: str) -> None:
    with changed(pipe):
        with pytest.warns(UserWarning, match="the plan was made for another pipeline") as shown:
            fdcompile.optimize(pipe, config)
        assert shown[0].filename == __file__
        for _ in range(2):
            sample(pipe, STEPS, guidance=GUIDANCE)
            report = fdcompile.explain(pipe)
            assert report.key_steps == (0, 1, 3)
            assert [line.endswith(note) for line in report.plan_notes] == [True]
            assert note in str(report)
        with pytest.raises(ValueError, match="was made for another pipeline"):
            fdcompile.optimize(pipe, replace(config, strict=True))
        assert fdcompile.explain(pipe) is not None, "what was optimized before stays so"
        ours = replace(config.plan, made_for=digests_of(describe_parts(pipe)))  # type: ignore[type-var]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            others = replace(config.plan, timesteps=tuple(t / 2 for t in ours.timesteps))  # type: ignore[type-var]
            fdcompile.optimize(pipe, replace(config, plan=(others, ours)))


@pytest.mark.parametrize(
    ("steps", "guidance", "note"),
    [
        (STEPS, 7.0, "guidance 7 is outside of the plan's 5"),
        (STEPS, 2.0, "guidance 2 is outside of the plan's 5"),
        (8, GUIDANCE, "the plan's key steps and weights are interpolated to 8 steps"),
        (12, GUIDANCE, "the plan is for another schedule"),
    ],
)
def test_in_another_run_it_warns_once_and_goes_as_far_as_it_can(
    pipe: Any, config: Config, steps: int, guidance: float, note: str
) -> None:
    fdcompile.optimize(pipe, config)
    with pytest.warns(UserWarning, match=note) as shown:
        sample(pipe, steps, guidance=guidance)
        sample(pipe, steps, guidance=guidance)
    assert len(shown) == 1
    report = fdcompile.explain(pipe)
    assert [line.startswith(note) for line in report.plan_notes] == [True]
    assert note in str(report)
    assert not report.stock_calls
    if steps == 12:
        assert report.encoder_runs == 6
    else:
        assert report.key_steps == ((0, 2, 4) if steps == 8 else (0, 1, 3))
    sample(pipe, STEPS, guidance=GUIDANCE)
    assert fdcompile.explain(pipe).plan_notes == ()
    fdcompile.optimize(pipe, replace(config, strict=True))
    with pytest.raises(ValueError, match=note):
        sample(pipe, steps, guidance=guidance)
    sample(pipe, STEPS, guidance=GUIDANCE)


def test_what_it_was_made_for_survives_json(config: Config) -> None:
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    older = json.loads(json.dumps(config.to_dict()))
    del older["plan"]["made_for"], older["strict"]
    assert Config.from_dict(older).plans[0].made_for is None
    hash(config)
    with pytest.raises(TypeError, match="made_for='UNet'"):
        Planned(**asdict(config.plans[0]) | {"made_for": "UNet"})
