"""The plan that the miniature ships, beside stock: ``pytest benchmarks/bench_plan.py --benchmark-json plan.json``."""

from __future__ import annotations

from typing import Any

import fdcompile
from fdcompile import Plan
from fdcompile.cli.sampling import MINIATURE_GUIDANCE, Sampling
from fdcompile.miniature import PLANS
from fdcompile.miniature.scenes import evaluation_scenes

WORK = 0.35


def test_planned(fdcompile_benchmark: Any) -> None:
    pipe = fdcompile.load_miniature()
    pipe.set_progress_bar_config(disable=True)
    captions = tuple(scene.caption for scene in evaluation_scenes(4))
    config = Plan.load(PLANS / "ddim-50.json").config(work=WORK)
    report = fdcompile_benchmark(pipe, config, **Sampling(captions, guidance=MINIATURE_GUIDANCE).call())
    assert report.flops <= WORK * report.stock_flops
