"""The fixture for pytest-benchmark."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import TEXT, small_pipe

from fdcompile import Config
from fdcompile.pipeline.session import find_session
from fdcompile.tools.pytest_plugin import paired


class Benchmark:
    """pytest-benchmark's fixture, as far as it is used: 2 seconds for each of the calls."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.order: list[str] = []
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[2.0]))

    def pedantic(self, call: Any, setup: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            call()
        self.stats.stats.data *= rounds


def test_it_pairs_each_call_with_a_stock_one(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark, pipe = Benchmark(), small_pipe()
    call = {"prompt_embeds": torch.randn(1, *TEXT), "negative_prompt_embeds": torch.randn(1, *TEXT)}
    monkeypatch.setattr("fdcompile.measure.timing.seconds", _four_seconds(benchmark))
    run = paired(benchmark)
    report = run(pipe, Config(key_steps=(0, 2)), **call, num_inference_steps=4, output_type="latent")
    info = benchmark.extra_info
    assert info["time_ratios"] == [0.5] * 3
    assert info["time_ratio"] == 0.5
    assert benchmark.order == ["stock"] * 3
    assert report.encoder_runs == info["encoder_runs"] == info["stage_calls"]["encoder"] == 2
    assert (info["flops"], info["stock_flops"]) == (report.flops, report.stock_flops)
    assert find_session(pipe) is None, "the pipeline stays stock"
    assert report.compile_seconds == {}, "what is timed compiles nothing"


def _four_seconds(benchmark: Benchmark) -> Any:
    def seconds(call: Any, timer: Any) -> float:
        benchmark.order.append("stock")
        return 4.0

    return seconds
