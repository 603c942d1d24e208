"""Ways by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from models import small_pipe

import fdcompile
from fdcompile.key_steps import PAPER
from fdcompile.measure.variant import TOME, Variant
from fdcompile.miniature import PLANS
from fdcompile.tools.evaluate.evaluate import with_references
from fdcompile.tools.evaluate.images import Spec
from fdcompile.tools.evaluate.variants import TABLE_3, VARIANTS, paper_table, parse_variant

PAPER_TIMESTEPS = {
    "non-uniform-i": (50, 40, 39, 38, 30, 25, 20, 15, 5),
    "non-uniform-ii": (50, 30, 25, 20, 15, 14, 5, 4, 3),
    "non-uniform-iii": (50, 41, 37, 35, 22, 21, 18, 14, 5),
    "non-uniform-iv": (50, 49, 48, 47, 45, 40, 35, 25, 15),
    "uniform-ii": (50, 44, 38, 32, 26, 20, 14, 8, 2),
    "uniform-iii": (50, 38, 26, 14, 2),
}


@pytest.fixture
def pipe() -> Any:
    return small_pipe()


def test_the_sets_of_table_3_count_down_in_the_paper() -> None:
    for name, timesteps in PAPER_TIMESTEPS.items():
        assert TABLE_3[name] == tuple(50 - timestep for timestep in timesteps)
    assert TABLE_3["uniform-i"] == tuple(50 - timestep for timestep in range(50, 0, -2))
    assert TABLE_3["non-uniform-iv"] == PAPER["paper"][50]


@pytest.mark.parametrize("name", VARIANTS)
def test_each_name_fits_a_pipe(name: str, pipe: Any) -> None:
    variant = parse_variant(name, pipe, work=0.5)
    assert variant.name == name
    assert variant.reference() == Variant("stock")
    assert variant.of(pipe).unet is not pipe.unet
    fdcompile.restore(pipe)


def test_a_number_is_fewer_steps() -> None:
    assert parse_variant("20", None, 0.5) == Variant("stock, 20 steps", steps=20) == Variant("paper").baseline(20)


def test_files(pipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(fdcompile.Config(key_steps=4).to_dict()))
    assert parse_variant(str(path), pipe, 0.5) == Variant("mine", fdcompile.Config(key_steps=4))
    miniature = fdcompile.load_miniature()
    planned = parse_variant(str(PLANS / "ddim-50.json"), miniature, 0.3)
    assert planned.config is not None
    assert planned.config.forecast == "auto"
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected a plan or a configuration"):
        parse_variant(str(path), pipe, 0.5)


@pytest.mark.parametrize("text", ["papers", "0", "missing.json", "-3"])
def test_anything_else_is_refused(text: str, pipe: Any) -> None:
    with pytest.raises(ValueError, match=f"'{text}': expected a number of steps"):
        parse_variant(text, pipe, 0.5)


def test_the_paper_tables_have_stock_before_each_row(pipe: Any) -> None:
    names = [(way.name, way.full_steps) for way in with_references(paper_table("table-1", pipe))]
    assert names == [
        ("stock, DDIM", 50),
        ("paper, DDIM", 50),
        ("stock, DPM-Solver", 20),
        ("paper, DPM-Solver", 20),
        ("stock, DPM-Solver++", 20),
        ("paper, DPM-Solver++", 20),
        ("stock, DDIM + ToMe", 50),
        ("paper, DDIM + ToMe", 50),
    ]
    assert [way.name for way in with_references(paper_table("table-2", pipe))][1] == "paper-personalized, DDIM"
    assert len(with_references(paper_table("table-3", pipe))) == 1 + len(TABLE_3)


class IFPipeline:
    pass


class TextToVideoSDPipeline:
    pass


def test_tables_of_other_pipelines() -> None:
    [row] = paper_table("table-1", IFPipeline())
    assert (row.full_steps, row.sampler) == (100, "DDPM")
    assert [way.name for way in paper_table("table-2", TextToVideoSDPipeline())] == ["paper, DDIM"]
    with pytest.raises(ValueError, match="table-3 has no row for IFPipeline; of this kind are in table-1"):
        paper_table("table-3", IFPipeline())
    with pytest.raises(ValueError, match="table-1 has no row for object; of this kind are in none of them"):
        paper_table("table-1", object())


def test_a_sampler_and_merged_tokens_leave_the_pipe_alone(pipe: Any) -> None:
    scheduler = pipe.scheduler
    solver = Variant("stock", sampler="DPM-Solver", patch=TOME).of(pipe)
    assert type(solver.scheduler) is DPMSolverMultistepScheduler
    assert solver.scheduler.config.algorithm_type == "dpmsolver"
    assert hasattr(solver.unet, "_tome_info")
    assert type(Variant("stock", sampler="DDPM").of(pipe).scheduler) is DDPMScheduler
    assert pipe.scheduler is scheduler
    assert not hasattr(pipe.unet, "_tome_info")


@pytest.mark.parametrize(
    "way", [Variant("paper", fdcompile.Config.paper()), Variant("own", sampler="DDPM", full_steps=9, patch=TOME)]
)
def test_fewer_steps_are_held_against_the_same_stock_pipeline(way: Variant) -> None:
    stock = way.reference()
    assert stock.reference() == stock == way.baseline(4).reference()
    asked = Spec([], {}, steps=30)
    assert asked.steps_of(stock) == asked.steps_of(way) == (way.full_steps or 30)
    assert asked.steps_of(way.baseline(4)) == 4


def test_ways_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two variants are called mine"):
        with_references([Variant("mine", fdcompile.Config.paper()), Variant("Mine", fdcompile.Config(key_steps=2))])
