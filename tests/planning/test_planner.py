"""A whole plan of a small pipeline."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from calls import call
from diffusers import StableDiffusionImg2ImgPipeline
from models import small_pipe

import fdcompile
from fdcompile import Config, Plan, plan
from fdcompile.measure.calls import run_call
from fdcompile.measure.fidelity import compute_fidelity
from fdcompile.pipeline.identity import describe_parts
from fdcompile.planning import planner, record, refit, trials

pytestmark = pytest.mark.usefixtures("few_key_steps_suffice")

STEPS = 6
CALLS = 2


def calls() -> list[dict[str, Any]]:
    return [call(seed, STEPS, guidance_scale=3.0 + seed) for seed in range(CALLS)]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return small_pipe()


class Meter:
    """Adds up what a plan takes of the UNet, stock runs of one call; `tried` are configurations, work and PSNR."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.runs = 0.0
        self.tried: list[tuple[Config, float, float]] = []
        self._in_trial = False
        self._patch = patch
        for module in (record, refit, trials):
            self._meter(module, "run_call", self._made)
        self._meter(trials.Trials, "run", self._tried)

    def _meter(self, place: Any, name: str, count: Any) -> None:
        wrapped = getattr(place, name)
        self._patch.setattr(place, name, lambda *args: count(wrapped, *args))

    def _made(self, wrapped: Any, *args: Any) -> Any:
        made = wrapped(*args)
        self.runs += 0 if self._in_trial else made.steps / STEPS
        return made

    def _tried(self, wrapped: Any, *args: Any) -> Any:
        self._in_trial = True
        report, fidelity = wrapped(*args)
        self._in_trial = False
        work = report.flops / report.stock_flops
        self.runs += work * CALLS / 2
        self.tried.append((args[1], work, fidelity.psnr))
        return report, fidelity


@pytest.fixture(scope="module")
def planned(pipe: Any) -> tuple[Plan, Meter]:
    """A plan, and what it took."""
    with pytest.MonkeyPatch.context() as patch:
        meter = Meter(patch)
        return plan(pipe, calls()), meter


def test_it_takes_at_most_25_runs_for_each_call(planned: tuple[Plan, Meter]) -> None:
    assert 1 < planned[1].runs / CALLS <= 25


def test_nothing_in_it_is_worse_than_the_default(planned: tuple[Plan, Meter]) -> None:
    made, meter = planned
    defaults = [
        (config, *figures) for config, *figures in meter.tried if not config.plans and config.forecast == "auto"
    ]
    assert [round(config.work * STEPS) for config, *_ in defaults] == [1, 2, 3, 4]
    for _, work, closeness in defaults:
        within = work + 0.01  # the first trial also computes what is known once a schedule
        assert made.point(work=within).fidelity.psnr >= closeness


def test_only_what_nothing_cheaper_equals_is_left(planned: tuple[Plan, Meter]) -> None:
    points = planned[0].points
    assert len(points) > 2
    for cheaper, closer in itertools.pairwise(points):
        assert cheaper.work < closer.work < 1
        assert cheaper.fidelity.psnr < closer.fidelity.psnr


def test_it_says_what_it_is_for(pipe: Any, planned: tuple[Plan, Meter]) -> None:
    made = planned[0]
    pipe.scheduler.set_timesteps(STEPS)
    assert made.timesteps == tuple(map(float, pipe.scheduler.timesteps.tolist()))
    assert made.guidance == (3.0, 4.0)
    assert (made.fitted, made.judged) == (1, 1)
    assert made.made_for == describe_parts(pipe)


def test_a_config_does_what_the_plan_says(pipe: Any, planned: tuple[Plan, Meter]) -> None:
    """Work, encoder runs and closeness, on the calls that were kept out of the fit."""
    made = planned[0]
    held_out = calls()[CALLS // 2 :]
    stock = [run_call(pipe, one) for one in held_out]
    for point in made.points[:: len(made.points) - 1]:
        fdcompile.optimize(pipe, made.configured(point))
        try:
            fidelity = compute_fidelity([run_call(pipe, one) for one in held_out], stock)
            report = fdcompile.explain(pipe)
        finally:
            fdcompile.restore(pipe)
        assert report.key_steps == point.key_steps
        assert report.encoder_runs == point.encoder_runs
        assert not report.held
        assert report.flops / report.stock_flops == pytest.approx(point.work, rel=0.01)
        assert fidelity.psnr == pytest.approx(point.fidelity.psnr, abs=0.1)


def test_baselines_have_at_least_the_work_of_each_point(planned: tuple[Plan, Meter]) -> None:
    made = planned[0]
    for point in made.points:
        baseline = made.baseline(point)
        assert baseline is not None
        assert baseline.work == baseline.steps / STEPS
        assert min(point.work, 1 - 1 / STEPS) <= baseline.work < point.work + 1 / STEPS


def test_with_many_more_steps_the_noise_levels_choose_as_large_a_share(pipe: Any, planned: tuple[Plan, float]) -> None:
    point = planned[0].points[-1]
    fdcompile.optimize(pipe, planned[0].configured(point))
    try:
        with pytest.warns(UserWarning, match=r"the plan is for another schedule.*this run has 10 timesteps"):
            run_call(pipe, call(0, 10))
        report = fdcompile.explain(pipe)
    finally:
        fdcompile.restore(pipe)
    assert report.encoder_runs == round(point.encoder_runs / STEPS * 10)
    assert report.forecast == "planned"
    assert not report.stock_calls


@pytest.fixture
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the steps key steps, one cut."""
    monkeypatch.setattr(planner, "SHARES", (0.5,))
    monkeypatch.setattr(planner, "SHARES_OF_CUTS", ())


@pytest.mark.usefixtures("few_candidates")
def test_the_pipeline_is_left_as_it_was(pipe: Any) -> None:
    before = run_call(pipe, call(0, STEPS)).latents
    names = set(vars(pipe)), set(vars(pipe.scheduler)), set(vars(pipe.unet))
    generator = torch.Generator().manual_seed(7)
    states = generator.get_state(), torch.get_rng_state()
    plan(pipe, [call(0, 2, generator=generator), call(1, 2)])
    assert torch.equal(run_call(pipe, call(0, STEPS)).latents, before)
    assert (set(vars(pipe)), set(vars(pipe.scheduler)), set(vars(pipe.unet))) == names
    assert torch.equal(generator.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])


@pytest.mark.usefixtures("few_candidates")
def test_an_optimized_pipe_is_planned_as_the_stock_one(pipe: Any) -> None:
    short = [call(0, 2), call(1, 2)]
    expected = plan(pipe, short)
    fdcompile.optimize(pipe, Config(key_steps=(0, 3)))
    before = run_call(pipe, call(0, STEPS)).latents
    assert plan(pipe, short) == expected
    assert torch.equal(run_call(pipe, call(0, STEPS)).latents, before)
    assert fdcompile.explain(pipe).key_steps == (0, 3)
    fdcompile.restore(pipe)


@pytest.mark.tables
@pytest.mark.usefixtures("few_candidates")
def test_a_run_that_begins_late_is_planned_from_there_on() -> None:
    pipe = small_pipe(StableDiffusionImg2ImgPipeline)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    late = [call(seed, STEPS, image=image, strength=0.5) for seed in range(2)]
    made = plan(pipe, late)
    assert len(made.timesteps) == STEPS
    for point in made.points:
        assert point.key_steps[:2] == (0, 3)
        assert point.encoder_runs == len(point.key_steps) - 1
        assert all(before == 0 for _, before in (point.weights or ())[:4])
    fdcompile.optimize(pipe, made.config(work=made.points[-1].work))
    run_call(pipe, late[0])
    report = fdcompile.explain(pipe)
    assert tuple(3 + key for key in report.key_steps) == made.points[-1].key_steps[1:]
    assert not report.held


def test_converged_runs_take_their_steps_whatever_timesteps_the_call_has(pipe: Any) -> None:
    (converged,) = trials.with_steps(pipe, [call(0, STEPS, timesteps=[900, 500, 100])], [4])
    assert converged.steps == 4


@pytest.mark.usefixtures("few_candidates")
def test_samplers_are_compared_at_the_same_work_with_converged_runs(pipe: Any) -> None:
    made = plan(pipe, calls()[:2], converged=20, samplers=("euler", "DDIM"))
    closeness = [row.fidelity.converged for row in (*made.points, *made.baselines)]
    assert all(value is not None and 0 < value < 100 for value in closeness)
    assert {row.sampler for row in made.samplers} == {"DDIMScheduler", "EulerDiscreteScheduler"}
    assert all(0 < row.converged < 100 for row in made.samplers)
    full = {row.sampler: row for row in made.samplers if row.unet_runs == STEPS}
    assert len(full) == 2
    assert {row.method for row in full.values()} == {"stock"}
    default = [row for row in made.samplers if row.method == "default"]
    assert len(default) > 2
    assert all(row.steps == STEPS and row.unet_runs < STEPS for row in default)
    fewer = [row for row in made.samplers if row.method == "stock" and row.steps < STEPS]
    assert all(row.unet_runs == row.steps for row in fewer)
    assert [row.converged for row in made.samplers if row.method == "planned"] == [
        point.fidelity.converged for point in made.points if point.forecast != "auto"
    ]
    assert "UNet runs an image, the closest to the converged images is" in str(made)


def refused(pipe: Any, *args: Any, **kwargs: Any) -> pytest.ExceptionInfo[Exception]:
    """The error of a plan that is refused before the UNet has run more than one call."""
    ran: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda *args: ran.append(1))
    try:
        with pytest.raises((TypeError, ValueError)) as error:
            plan(pipe, *args, **kwargs)
    finally:
        handle.remove()
    assert len(ran) <= 2 * STEPS
    return error


def test_bad_calls_are_refused(pipe: Any) -> None:
    assert "expected at least 2" in str(refused(pipe, []).value)
    assert "expected at least 2" in str(refused(pipe, [call(0, STEPS)]).value)
    assert "expected a list of prompts" in str(refused(pipe, "a photograph").value)
    assert "a prompt is empty" in str(refused(pipe, ["a photograph", " "]).value)
    assert "prompts only, or dicts" in str(refused(pipe, ["a photograph", call(0, STEPS)]).value)
    assert "takes no seed" in str(refused(pipe, calls(), seed=3).value)
    assert "sampler 'Eulr': expected one of DDIM" in str(refused(pipe, calls(), samplers=["Eulr"]).value)
    assert "DDPMScheduler adds fresh noise" in str(refused(pipe, calls(), samplers=["ddpm"]).value)
    assert "expected at least 2, of which" in str(refused(pipe, [call(0, 1), call(1, 1)]).value)
    assert "different schedules" in str(refused(pipe, [call(0, 2), call(1, 4), call(2, 2)]).value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"converged": 2.5}, "converged=2.5: expected a number of steps, or None"),
        ({"converged": "x"}, "converged='x': expected a number of steps, or None"),
        ({"converged": True}, "converged=True: expected a number of steps, or None"),
        ({"converged": 0}, f"converged=0: expected at least the {STEPS} steps of the calls"),
        ({"converged": -1}, f"converged=-1: expected at least the {STEPS} steps of the calls"),
        ({"converged": STEPS - 1}, f"converged={STEPS - 1}: expected at least the {STEPS} steps of the calls"),
        ({"samplers": [3]}, r"samplers=[3]: expected a list of names, such as ['DDIM', 'Euler']"),
        ({"samplers": "DDIM"}, "samplers='DDIM': expected a list of names"),
        ({"samplers": 3}, "samplers=3: expected a list of names"),
    ],
)
def test_bad_options_are_refused_before_any_call(
    given: dict[str, Any], message: str, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "record", lambda *args: pytest.fail("a call was run"))
    assert message in str(refused(pipe, calls(), **given).value)


def test_converged_runs_of_calls_without_a_number_of_steps_have_at_least_one(pipe: Any) -> None:
    timed = [call(seed, STEPS, timesteps=[900, 500, 100]) for seed in range(CALLS)]
    assert "converged=0: expected at least the 1 steps" in str(refused(pipe, timed, converged=0).value)


def test_what_cannot_be_planned_is_refused(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "scheduler", type("Steps", (), {"step": None})())
        assert "Steps has no set_timesteps" in str(refused(pipe, calls()).value)
    shifted = small_pipe()
    shifted.unet.register_forward_pre_hook(lambda unet, args: (args[0], args[1].clone(), *args[2:]))
    assert "not an element of scheduler.timesteps" in str(refused(shifted, calls()).value)
