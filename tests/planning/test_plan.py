"""What can be asked of a plan, and how it is kept."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fdcompile import DECODER, Config, Plan, Planned
from fdcompile.measure.fidelity import Fidelity
from fdcompile.pipeline.identity import digests_of
from fdcompile.planning.plan import FewerSteps, Point, SamplerRow

TIMESTEPS = (800.0, 600.0, 400.0, 200.0)
WEIGHTS = ((1.0, 0.0), (1.0, 0.0), (1.5, -0.5), (2.0, -1.0))


def fidelity(psnr: float) -> Fidelity:
    return Fidelity(psnr, psnr + 1, 0.9, None)


HELD = Point("output", (), "held", (0,), None, 0.25, 1, fidelity(30.0))
FITTED = Point("output", (), "fitted", (0, 1), WEIGHTS, 0.5, 2, fidelity(40.0))
DEEPER = Point("encoder propagation", DECODER, "refitted", (0, 1), WEIGHTS, 0.7, 2, fidelity(45.0))
PLAN = Plan(
    made_for={"UNet": {"class": "UNet"}, "scheduler": {"class": "Scheduler"}},
    made_with={"fdcompile": "1"},
    timesteps=TIMESTEPS,
    guidance=(3.0, 5.0),
    fitted=4,
    judged=4,
    points=(HELD, FITTED, DEEPER),
    baselines=(
        FewerSteps(1, 0.25, fidelity(20.0)),
        FewerSteps(2, 0.5, fidelity(25.0)),
        FewerSteps(3, 0.75, fidelity(50.0)),
    ),
    paper=replace(DEEPER, work=0.8),
)


COMPARED = replace(
    PLAN,
    samplers=(
        SamplerRow("Scheduler", "stock", 4, 4.0, 60.0),
        SamplerRow("Scheduler", "stock", 1, 1.0, 30.0),
        SamplerRow("Scheduler", "planned", 4, 1.0, 41.0),
        SamplerRow("Other", "default", 4, 1.0, 40.0),
    ),
)


@pytest.mark.parametrize(("asked", "point"), [({"work": 0.5}, FITTED), ({"work": 0.69}, FITTED), ({"psnr": 30}, HELD)])
def test_a_config_is_the_closest_or_the_cheapest(asked: dict[str, float], point: Point) -> None:
    forecast: Any = "hold" if point.weights is None else "auto"
    planned = Planned(TIMESTEPS, point.key_steps, point.weights, (3.0, 5.0), made_for=digests_of(PLAN.made_for))
    assert PLAN.config(**asked) == Config(
        "auto", point.recompute, forecast, work=point.encoder_runs / len(TIMESTEPS), plan=planned
    )


def test_where_the_default_won_its_configuration_is_for_any_schedule() -> None:
    default = replace(FITTED, forecast="auto", weights=None)
    assert PLAN.configured(default) == Config(work=0.5)
    late = replace(PLAN, start=2)
    assert late.configured(replace(default, key_steps=(0, 2), encoder_runs=1)) == Config(work=0.5)


def test_the_nearest_is_named_where_nothing_is_within_what_is_asked() -> None:
    with pytest.raises(ValueError, match=r"work=0.1: .* nearest is output, held: 0.250 of the work, 30.0 dB"):
        PLAN.config(work=0.1)
    with pytest.raises(
        ValueError, match=r"psnr=60: .* nearest is encoder propagation, refitted: 0.700 of the work, 45"
    ):
        PLAN.config(psnr=60)
    for asked in ({}, {"work": 0.5, "psnr": 30.0}):
        with pytest.raises(TypeError, match="expected exactly one of the two"):
            PLAN.config(**asked)


def test_the_best_gains_most_for_what_it_saves() -> None:
    assert PLAN.best() == PLAN.configured(HELD)  # 10 dB for 0.75 of the work; the next 15 for 0.5
    better = replace(PLAN, points=(HELD, replace(FITTED, fidelity=fidelity(41.0)), DEEPER))
    assert better.best().key_steps == PLAN.configured(FITTED).key_steps


def test_a_control_has_at_least_the_work_or_all_steps_but_one() -> None:
    baselines = [PLAN.baseline(replace(HELD, work=work)) for work in (0.2, 0.25, 0.3, 0.7, 0.9)]
    assert [baseline.steps for baseline in baselines if baseline is not None] == [1, 1, 2, 3, 3]
    assert replace(PLAN, baselines=()).baseline(HELD) is None


def test_where_fewer_steps_are_as_close_it_says_so() -> None:
    assert PLAN.gain(DEEPER) == -5
    with pytest.warns(UserWarning, match="stock with 3 steps: 0.750 of the work, 50.0 dB is as close") as caught:
        PLAN.config(work=0.7)
    assert caught[0].filename == __file__
    assert "Fewer steps are as good at 0.700 of the work" in str(PLAN)
    behind = replace(PLAN, points=(DEEPER,))
    assert "Fewer steps are as good: ask the stock pipeline" in str(behind)
    with pytest.raises(ValueError, match="fewer steps are as good everywhere: stock with 3 steps"):
        behind.best()


def test_the_table_has_a_row_a_point_and_its_control() -> None:
    rows = [line.split() for line in str(PLAN).splitlines()]
    assert ["0.500", "2", "output", "fitted", "40.0", "41.0", "0.900", "2:", "25.0", "+15.0"] in rows
    assert "converged" not in str(PLAN)
    assert "guidance 3 to 5" in str(PLAN)


@pytest.mark.parametrize("plan", [PLAN, COMPARED])
def test_it_survives_json(plan: Plan, tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    hash(Plan.load(tmp_path / "plan.json").points)


def test_of_compared_samplers_it_says_which_to_use_for_the_recommended_work() -> None:
    assert COMPARED.sampler_verdict().endswith("is Scheduler, planned, 4 steps (41.0 dB).")
    better = replace(COMPARED, samplers=(*COMPARED.samplers, SamplerRow("Other", "stock", 1, 1.0, 45.0)))
    verdict = better.sampler_verdict()
    assert "at most 1.0 UNet runs an image" in verdict
    assert "Other, stock, 1 steps (45.0 dB); of this plan's sampler Scheduler, planned, 4 steps (41.0 dB)" in verdict
    assert verdict in str(better)
    assert str(better).index("Other      stock    1      1.0        45.0") < str(better).index(" 4.0 ")
    assert "No sampler was tried" in replace(PLAN, samplers=COMPARED.samplers[:1]).sampler_verdict()


@pytest.mark.parametrize("change", [{"schema": 0}, {"points": [{}]}, {"points": 3}, {"other": 1}])
def test_other_files_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"plan.json is no plan of this version"):
        Plan.load(path)


@pytest.mark.parametrize("text", ["", "[]", '{"schema"'])
def test_files_that_are_no_plan_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"plan.json is no plan"):
        Plan.load(path)


def test_it_is_drawn(tmp_path: Path) -> None:
    PLAN.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_verdict_is_of_the_paper_s_row_too() -> None:
    closer = replace(PLAN, points=(HELD,), paper=replace(DEEPER, work=0.8))
    assert closer.verdict() == (
        "All planned points are closer than the stock pipeline with fewer steps at the same work. "
        "Not so the paper's key steps (last row): 5.0 dB behind fewer steps."
    )
    assert replace(closer, paper=replace(DEEPER, fidelity=fidelity(60.0))).verdict().endswith("at the same work.")


MALFORMED: list[dict[str, Any]] = [
    {"start": "x"},
    {"start": -5},
    {"made_for": {}},
    {"made_for": ["UNet"]},
    {"made_for": {"UNet": {}, "scheduler": {}}},
    {"points": [{**json.loads(json.dumps(asdict(HELD))), "work": "much"}]},
    {"baselines": [{"steps": 3, "work": 0.5, "fidelity": {**asdict(fidelity(30.0)), "psnr": None}}]},
]


@pytest.mark.parametrize(
    "changed", [{"points": []}, {"timesteps": "abc"}, {"timesteps": [1.0]}, {"guidance": [5, 3]}, *MALFORMED]
)
def test_a_file_with_a_plan_that_cannot_be_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ValueError, match="is no plan of this version"):
        Plan.load(path)


def test_a_plan_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    before = path.read_text()

    def half(target: Path, text: str, **_: Any) -> None:
        target.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        replace(PLAN, fitted=5).save(path)
    assert (path.read_text(), list(tmp_path.iterdir())) == (before, [path])
