"""What a way costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import sample, small_pipe

import fdcompile
from fdcompile.measure.cost import live_bytes, measure, peak_bytes


def call(pipe: Any) -> None:
    sample(pipe, steps=4, batch=2)


def test_bytes_are_counted_while_they_live() -> None:
    held = torch.zeros(1000)
    with live_bytes() as most:
        one = held + 1
        view = one.view(10, 100)
        del one
        view += 1
        assert most() == 4000, "a view and an operation in place need no memory, and what was there is not counted"
        other = view * 2
        del view
        assert most() == 8000
        for _ in range(5):
            other = other.relu()
        assert most() == 8000
    torch.zeros(100_000)
    assert most() == 8000


def test_stock_and_optimised_are_measured_alike() -> None:
    stock = small_pipe()
    beside = measure("stock", stock, None, call, pictures=2)
    assert (beside.unet_calls, beside.ratio, beside.timeline) == (4, None, None)
    optimised = fdcompile.optimize(small_pipe(), fdcompile.Config(key_steps=(0, 2)))
    own = measure("paper", optimised, stock, call, pictures=2)
    report = fdcompile.explain(optimised)
    assert own.unet_calls == 2
    assert own.gflop == pytest.approx(report.flops / 2 / 1e9)
    assert beside.gflop == pytest.approx(report.stock_flops / 2 / 1e9)
    assert own.ratio is not None
    assert own.stock_seconds is not None
    assert own.stock_seconds > 0
    assert beside.stock_seconds is None
    assert 0 < own.unet_seconds < own.seconds
    assert own.timeline is not None
    assert [step.kind for step in own.timeline.steps] == ["key", "reused", "key", "reused"]
    weights = sum(weight.nbytes for part in (stock.unet, stock.vae) for weight in part.parameters())
    assert beside.memory is not None
    assert own.memory is not None
    assert own.memory > beside.memory > weights


def test_compiled_code_does_not_say_what_it_needs() -> None:
    pipe = fdcompile.optimize(small_pipe(), fdcompile.Config.paper(backend="inductor"))
    assert peak_bytes(pipe, lambda _: pytest.fail("it was called")) is None
