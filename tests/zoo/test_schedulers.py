"""Every scheduler of diffusers, listed by inspection; their results are the table in docs/schedulers.md."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import diffusers.schedulers
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
)
from models import TEXT, assert_equal, ddim, sample, small_pipe
from tables import Table
from torch import Tensor

import fdcompile
from fdcompile import Config
from fdcompile.forecasting.noise_levels import fresh_noise

CLASSES = {
    name: kind
    for name, kind in inspect.getmembers(diffusers.schedulers, inspect.isclass)
    if issubclass(kind, SchedulerMixin) and name.endswith("Scheduler")
}
VARIANTS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
NEEDS: dict[str, dict[str, Any]] = {
    "UnCLIPScheduler": {"beta_schedule": "squaredcos_cap_v2"},
    "DPMSolverSDEScheduler": {"noise_sampler_seed": 0},
}
"""Configuration that a scheduler needs; the last one draws its noise from this seed, not from the generator."""

STEPS = {"ConsistencyDecoderScheduler": 2}
"""Number of steps of schedulers that take no more."""

WHY = {
    "adds fresh noise": "fresh noise at each step",
    "does not expose its noise levels": "noise levels unknown",
    "every step is a key step, because": "few steps",
}
"""Reasons why every step is a key step by default, by part of the warning."""

DAILY = (
    "AmusedScheduler",  # not a drop-in replacement
    "DDIMInverseScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",  # custom loop only, two calls a step
    "HeliosScheduler",  # stock cannot use it
    "UniPCMultistepScheduler, use_karras_sigmas",
)
"""Schedulers that `make test` runs: one of each kind. `test_executor.py` runs the usual ones."""


def variants() -> Iterator[tuple[str, type[Any], dict[str, Any]]]:
    for name, kind in CLASSES.items():
        needs = NEEDS.get(name, {})
        yield name, kind, needs
        parameters = inspect.signature(kind).parameters
        for option in VARIANTS:
            if option in parameters:
                yield f"{name}, {option}", kind, {**needs, option: True}
    yield (
        "DPMSolverMultistepScheduler, sde-dpmsolver++",
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++"},
    )


def loop(pipe: Any, steps: int, start: int = 0) -> Tensor:
    """A custom sampling loop, which needs fewer methods of a scheduler than the pipeline does."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    if start:
        scheduler.set_begin_index(start)
    text = torch.randn(1, *TEXT, generator=torch.Generator().manual_seed(1))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    with torch.no_grad():
        for t in scheduler.timesteps[start:]:
            noise = pipe.unet(latents, t, encoder_hidden_states=text).sample
            latents = scheduler.step(noise, t, latents).prev_sample
    return latents


def stock_run(pipe: Any, steps: int) -> tuple[str, Callable[[Any], Tensor], Tensor | None]:
    """Returns whether stock `pipe` runs with its scheduler, in words, the function that runs it, and its latents.

    The latents are None if neither the pipeline nor a custom loop runs.
    """
    errors = []
    for words, run in (("yes", sample), ("yes, in a loop of its own", loop)):
        try:
            return words, functools.partial(run, steps=steps), run(pipe, steps=steps)
        except Exception as error:
            errors.append(type(error).__name__)
    return f"stock cannot use it: {errors[0]}, in a loop {errors[1]}", loop, None


def rounding_moves(twin: Any, run: Callable[[Any], Tensor], expected: Tensor) -> float:
    """Largest change of the stock latents if every prediction of the stock UNet is rounded differently."""
    torch.manual_seed(0)

    def disturb(unet: Any, args: Any, output: Any) -> Any:
        sample = output[0] * (1 + 1e-7 * torch.randn_like(output[0]))
        return (sample,) if isinstance(output, tuple) else type(output)(sample=sample)

    handle = twin.unet.register_forward_hook(disturb)
    try:
        return float((run(twin) - expected).abs().max())
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def twin() -> Any:
    return small_pipe()


@pytest.mark.usefixtures("few_key_steps_suffice")
@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [pytest.param(*row, id=row[0], marks=() if row[0] in DAILY else pytest.mark.tables) for row in variants()],
)
def test_scheduler(
    name: str, kind: type[Any], options: dict[str, Any], pipe: Any, twin: Any, schedulers_table: Table
) -> None:
    """With every step a key step the latents equal stock's; with fewer, no call needs the stock UNet."""
    steps = STEPS.get(name, 7)
    try:
        twin.scheduler = kind.from_config(ddim().config, **options)
    except Exception as error:
        schedulers_table.check(name, f"it is no drop-in scheduler: {type(error).__name__}", *[""] * 4)
        return
    words, run, expected = stock_run(twin, steps)
    if expected is None:
        schedulers_table.check(name, words, *[""] * 4)
        return
    assert expected.isfinite().all()
    atol = 1e-4 * expected.abs().max().item()
    if "Inverse" in name:
        words, atol = f"{words}, amplifies rounding", atol + 10 * rounding_moves(twin, run, expected)
    pipe.scheduler = kind.from_config(ddim().config, **options)
    fdcompile.optimize(pipe, Config(key_steps="all"))
    torch.testing.assert_close(run(pipe), expected, rtol=0, atol=atol)
    every = fdcompile.explain(pipe)
    assert every.stock_reasons == {}
    fdcompile.optimize(pipe, Config(key_steps=3))
    run(pipe)
    third = fdcompile.explain(pipe)
    assert third.stock_reasons == {}
    assert third.decoder_evaluations >= every.decoder_evaluations
    fdcompile.optimize(pipe)
    with no_warnings():
        actual = run(pipe)
    default = fdcompile.explain(pipe)
    assert default.stock_reasons == {}
    if default.held:
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
        assert default.encoder_runs == every.encoder_runs
    else:
        assert default.encoder_runs == round(every.encoder_runs / 2)
    why = ", ".join(WHY[words] for words in WHY for reason in default.held if words in reason)
    runs = [f"{report.encoder_runs}" for report in (every, third, default)]
    schedulers_table.check(name, words, *runs, why)


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def draws_noise(scheduler: Any) -> bool | None:
    """Returns whether a step before the last one draws random numbers; None if the scheduler cannot be stepped."""
    generator = torch.Generator()
    seeded = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    try:
        scheduler.set_timesteps(7)
        sample = torch.randn(1, 4, 8, 8)
        for t in scheduler.timesteps[:-1]:
            before = generator.get_state(), torch.get_rng_state()
            sample = scheduler.step(0.3 * scheduler.scale_model_input(sample, t), t, sample, **seeded)[0]
            if not all(map(torch.equal, before, (generator.get_state(), torch.get_rng_state()))):
                return True
    except Exception:
        return None
    return False


def test_schedulers_that_add_fresh_noise_are_known() -> None:
    """`draws_noise` misses schedulers with a noise sampler of their own, which are listed in `hidden`."""
    told = {}
    for name, kind, options in variants():
        with contextlib.suppress(Exception), no_warnings():
            scheduler = kind.from_config(ddim().config, **options)
            told[name] = draws_noise(scheduler), fresh_noise(scheduler)
    assert sum(draws is not None for draws, _ in told.values()) > 60
    hidden = {name for name in told if name.startswith(("DPMSolverSDE", "CosineDPM"))}
    wrong = {name for name, (draws, known) in told.items() if draws is not None and draws != known}
    assert wrong == hidden


def test_the_table_lists_nothing_else(schedulers_table: Table) -> None:
    schedulers_table.keep([name for name, _, _ in variants()])


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (EulerDiscreteScheduler, {"timesteps": [901, 801, 601, 401, 301, 101, 21]}),
        (EulerDiscreteScheduler, {"sigmas": [13.0, 7.0, 3.0, 1.5, 0.8, 0.4, 0.1, 0.0]}),
        (LCMScheduler, {"timesteps": [999, 799, 599, 399, 199, 99, 19]}),
    ],
)
def test_custom_timesteps_and_sigmas(kind: type[Any], arguments: dict[str, Any], pipe: Any, twin: Any) -> None:
    for sampled in (pipe, twin):
        sampled.scheduler = kind.from_config(ddim().config)
    fdcompile.optimize(pipe, Config(key_steps="all"))
    expected = sample(twin, **arguments)
    assert_equal(sample(pipe, **arguments), expected)
    report = fdcompile.explain(pipe)
    assert (report.num_steps, report.stock_calls) == (7, 0)


def test_begin_index(pipe: Any, twin: Any) -> None:
    """A custom sampling loop can start in the middle of a schedule."""
    for sampled in (pipe, twin):
        sampled.scheduler = DPMSolverMultistepScheduler.from_config(ddim().config)
    fdcompile.optimize(pipe, Config(key_steps="all"))
    assert_equal(loop(pipe, steps=14, start=4), loop(twin, steps=14, start=4))
    assert fdcompile.explain(pipe).num_steps == 10
