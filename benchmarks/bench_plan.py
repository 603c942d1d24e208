"""Times the miniature's shipped plan against stock: ``pytest benchmarks/bench_plan.py --benchmark-json plan.json``."""

from __future__ import annotations

from typing import Any

import fdcompile
from fdcompile import Plan
from fdcompile.measure.calls import seeded
from fdcompile.miniature import GUIDANCE, PLANS
from fdcompile.miniature.scenes import evaluation_scenes

WORK = 0.35


def test_planned(fdcompile_benchmark: Any) -> None:
    pipe = fdcompile.load_miniature()
    pipe.set_progress_bar_config(disable=True)
    captions = tuple(scene.caption for scene in evaluation_scenes(4))
    config = Plan.load(PLANS / "ddim-50.json").config(work=WORK)
    report = fdcompile_benchmark(pipe, config, **seeded(captions, 0, guidance_scale=GUIDANCE, num_inference_steps=50))
    assert report.flops <= WORK * report.stock_flops
