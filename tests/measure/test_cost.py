"""What a way costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import sample, small_pipe

import fdcompile
from fdcompile.measure.cost import LiveBytes, measure, peak_bytes


def call(pipe: Any) -> None:
    sample(pipe, steps=4, batch=2)


def test_bytes_are_counted_while_they_live() -> None:
    held = torch.zeros(1000)
    with LiveBytes() as live:
        one = held + 1
        view = one.view(10, 100)
        del one
        view += 1
        assert live.peak == 4000, "a view and an operation in place need no memory, and what was there is not counted"
        other = view * 2
        del view
        assert live.peak == 8000
        for _ in range(5):
            other = other.relu()
        assert live.peak == 8000
    torch.zeros(100_000)
    assert live.peak == 8000


def test_stock_and_optimized_are_measured_alike() -> None:
    stock = small_pipe()
    stock_cost = measure("stock", stock, None, call, images=2)
    assert (stock_cost.unet_calls, stock_cost.ratio, stock_cost.timeline) == (4, None, None)
    optimized = fdcompile.optimize(small_pipe(), fdcompile.Config(key_steps=(0, 2)))
    cost = measure("paper", optimized, stock, call, images=2)
    report = fdcompile.explain(optimized)
    assert cost.unet_calls == 2
    assert cost.gflop == pytest.approx(report.flops / 2 / 1e9)
    assert stock_cost.gflop == pytest.approx(report.stock_flops / 2 / 1e9)
    assert cost.ratio is not None
    assert cost.stock_seconds is not None
    assert cost.stock_seconds > 0
    assert stock_cost.stock_seconds is None
    assert 0 < cost.unet_seconds < cost.seconds
    assert cost.timeline is not None
    assert [step.kind for step in cost.timeline.steps] == ["key", "reused", "key", "reused"]
    weights = sum(weight.nbytes for part in (stock.unet, stock.vae) for weight in part.parameters())
    assert stock_cost.memory is not None
    assert cost.memory is not None
    assert cost.memory > stock_cost.memory > weights


def test_compiled_code_does_not_say_what_it_needs() -> None:
    pipe = fdcompile.optimize(small_pipe(), fdcompile.Config.paper(backend="inductor"))
    assert peak_bytes(pipe, lambda _: pytest.fail("it was called")) is None
