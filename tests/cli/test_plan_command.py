"""fdcompile plan, and what the other commands make of a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import diffusers
import pytest
from cli.conftest import rows
from diffusers import StableDiffusionPipeline
from PIL import Image

import fdcompile
from fdcompile import Plan
from fdcompile.cli.cli import main
from fdcompile.cli.configuration import make_config, read_plan
from fdcompile.cli.errors import UserError
from fdcompile.cli.loading import load_pipe
from fdcompile.cli.options import ModelOptions, RunOptions
from fdcompile.measure.fidelity import Fidelity
from fdcompile.miniature import PLANS
from fdcompile.miniature.scenes import evaluation_scenes, planning_scenes
from fdcompile.pipeline.identity import describe_parts, differences_of, digests_of
from fdcompile.planning.plan import FewerSteps, Point

STEPS = 3


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\na blue square\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plan(model: str) -> Plan:
    """A plan of the small model, with what a plan measures made up."""
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.scheduler.set_timesteps(STEPS)
    fidelity = Fidelity(40.0, 41.0, 0.9, None)
    point = Point("output", (), "fitted", (0, 1), ((1.0, 0.0), (1.0, 0.0), (1.5, -0.5)), 0.7, 2, fidelity)
    return Plan(
        made_for=describe_parts(pipe),
        made_with={},
        timesteps=tuple(pipe.scheduler.timesteps.tolist()),
        guidance=(4.0, 4.0),
        fitted=1,
        judged=1,
        points=(point,),
        baselines=(FewerSteps(2, 2 / 3, fidelity),),
        paper=point,
    )


@pytest.fixture
def planned(plan: Plan, tmp_path: Path) -> Path:
    plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_a_plan_is_made_printed_and_written(
    model: str, prompts: Path, plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def make(pipe: Any, calls: Any, progress: Any, **options: Any) -> Plan:
        progress("recording", 0.0)
        asked.update(scheduler=type(pipe.scheduler).__name__, calls=calls, **options)
        return plan

    monkeypatch.setattr(fdcompile, "plan", make, raising=False)
    path, page = prompts.with_name("plan.json"), prompts.with_name("plan.html")
    options = ["--prompts", str(prompts), "--steps", "7", "--guidance", "4", "--converged", "30", "--report", str(page)]
    options += ["--samplers", "dpm, euler"]
    kind = "EulerDiscreteScheduler"
    assert main(["plan", "--model", model, *options, "--scheduler", kind, "--output", str(path)]) == 0
    assert asked == {
        "scheduler": kind,
        "calls": ["a red circle", "a blue square"],
        "converged": 30,
        "samplers": ("dpm", "euler"),
        "num_inference_steps": 7,
        "guidance_scale": 4.0,
    }
    printed = capsys.readouterr().out
    assert str(plan) in printed
    assert f"--plan {path} --work 0.70" in printed
    assert Plan.load(path) == plan
    html = unescape(page.read_text())
    assert plan.verdict() in html
    assert html.count("<tr>") == len(plan.rows())
    assert '<img src="data:image/png;base64,' in html


def test_demo_shows_four_columns(
    model: str, planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    image = tmp_path / "demo.png"
    page = tmp_path / "demo.html"
    options = ["--steps", str(STEPS), "--guidance", "4", "--plan", str(planned), "--work", "0.7", "--report", str(page)]
    assert main(["demo", "--model", model, "--prompt", "a square", *options, "--output", str(image)]) == 0
    printed = capsys.readouterr().out
    table = rows(printed)
    assert "stock, 2 steps" in printed
    assert table["encoder runs"] == ["3", "3", "2", "2"]
    assert "key steps 0 1 2;" in page.read_text(), "the fewer steps of the baseline have other ones"
    assert table["decoder evaluations"][2] == "3 in 2 calls"
    assert "(0.667 of stock)" in table["GFLOP per image"][3]
    with Image.open(image) as image:
        assert image.size == (260 + 4 * 174, 56 + 174)


def test_a_plan_is_printed_before_it_is_saved(
    model: str, prompts: Path, plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(plan: Plan, path: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fdcompile, "plan", lambda *_, **__: plan, raising=False)
    monkeypatch.setattr(Plan, "save", full)
    path = prompts.with_name("plan.json")
    assert main(["plan", "--model", model, "--prompts", str(prompts), "--output", str(path)]) == 2
    captured = capsys.readouterr()
    assert str(plan) in captured.out
    assert "No space left on device" in captured.err.splitlines()[-1]


def test_a_plan_for_other_weights_warns_and_is_refused_where_asked(planned: Path) -> None:
    pipe = fdcompile.load_miniature()
    pipe.scheduler.set_timesteps(STEPS)
    timesteps = tuple(pipe.scheduler.timesteps.tolist())
    replace(Plan.load(planned), timesteps=timesteps).save(planned)
    plan, point = read_plan(planned, pipe, 0.7, STEPS)
    with pytest.warns(UserWarning, match=r"the plan was made for another pipeline \(UNet's configuration"):
        fdcompile.optimize(pipe, plan.configured(point))
    with pytest.raises(UserError, match="UNet's configuration"):
        read_plan(planned, pipe, 0.7, STEPS, strict=True)
    better = replace(plan, baselines=(replace(plan.baselines[0], fidelity=Fidelity(20.0, 20.0, 0.5, None)),))
    with pytest.warns(UserWarning, match="was made for another pipeline"):
        fdcompile.optimize(pipe, better)
    with pytest.raises(ValueError, match="was made for another pipeline"):
        fdcompile.optimize(pipe, replace(better.best(), strict=True))


def test_a_plan_for_something_else_is_refused(
    model: str, planned: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    arguments = ["demo", "--model", model, "--plan", str(planned)]
    other = refusal(*arguments, "--steps", "4", "--work", "0.9", "--strict")
    assert "it is for 3 timesteps" in other
    other = refusal(*arguments, "--steps", "3", "--work", "0.9", "--guidance", "6", "--strict")
    assert "guidance 6 is outside of the plan's 4" in other
    usual = refusal(*arguments, "--steps", "3", "--work", "0.9", "--strict")
    assert "guidance 7.5 is outside" in usual, "the pipeline's own"
    assert "no measured point meets this" in refusal(*arguments, "--steps", "3", "--work", "0.01")
    assert "UNet's" in refusal("demo", *arguments[3:], "--steps", "3", "--work", "0.9", "--strict"), "the miniature"
    export = ["export", "--output", str(tmp_path / "package"), "--format", "aot_inductor", "--plan", str(planned)]
    assert "leave --key-steps out" in refusal(*export, "--key-steps", "2")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--output", "nowhere/plan.json"], "there is no folder 'nowhere'"),
        (["--output", "plan.json", "--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--output", "plan.json", "--steps", "0"], "expected a whole number from 1"),
        ([], "Missing option '--output'"),
    ],
)
def test_what_can_be_seen_to_be_wrong_is_said_at_once(
    arguments: list[str], expected: str, refusal: Callable[..., str]
) -> None:
    assert expected in refusal("plan", *arguments)


def test_prompts_are_needed(model: str, tmp_path: Path, prompts: Path, refusal: Callable[..., str]) -> None:
    output = ["--output", str(tmp_path / "plan.json")]
    assert "--prompts is required" in refusal("plan", "--model", model, *output)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n  \n", encoding="utf-8")
    assert "expected at least 2 prompts" in refusal("plan", "--model", model, "--prompts", str(empty), *output)
    arguments = ["plan", "--model", model, "--prompts", str(prompts), *output]
    assert "diffusers has none of that name" in refusal(*arguments, "--scheduler", "UNet2DConditionModel")


def test_the_miniature_is_planned_with_scenes_that_it_is_not_judged_by() -> None:
    scenes = planning_scenes(16)
    assert len(set(scenes)) == 16
    assert not set(scenes) & set(evaluation_scenes())


@pytest.mark.parametrize(("name", "steps"), [("ddim-50", 50), ("dpm-solver++-20", 20)])
def test_the_miniature_ships_with_plans_for_itself(name: str, steps: int) -> None:
    plan, pipe = Plan.load(PLANS / f"{name}.json"), fdcompile.load_miniature()
    pipe.scheduler = getattr(diffusers, plan.made_for["scheduler"]["class"]).from_config(pipe.scheduler.config)
    assert not differences_of(digests_of(describe_parts(pipe)), digests_of(plan.made_for))
    assert len(plan.timesteps) == steps
    assert plan.guidance == (3.0, 3.0)
    assert all(plan.gain(point) > 0 for point in plan.points)


def test_a_plan_leaves_the_other_options_as_given() -> None:
    running = RunOptions(plan=PLANS / "ddim-50.json", max_parallel_steps=2, backend="eager")
    config = make_config(load_pipe(ModelOptions()), running, 50)
    assert (config.forecast, config.max_parallel_steps, config.backend) == ("auto", 2, "eager")
    assert config.plans
