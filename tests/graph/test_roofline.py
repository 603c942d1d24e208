"""The least time of a graph, counted by hand."""

from __future__ import annotations

import pytest
import torch
from models import sample
from torch import nn

import fdcompile
from fdcompile import Config
from fdcompile.graph.flops import shapes
from fdcompile.graph.roofline import CARDS, Card, roofline
from fdcompile.measure.roofline import roofline_report


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.linear(x).reshape(4, 16)))


def test_each_operation_takes_the_longer_of_its_arithmetic_and_its_traffic() -> None:
    x = torch.randn(2, 2, 8)
    graph_module = torch.export.export(Layers(), (x,)).module(check_guards=False)
    slow_memory = roofline(graph_module, shapes([x]), Card(flops=1e12, bandwidth=1.0))
    linear = 2 * (4 * 8 + 16 * 8 + 16 + 4 * 16)
    norm = 2 * (4 * 16 + 16 + 16 + 4 * 16 + 4 * 16)
    assert (slow_memory.flops, slow_memory.bytes, slow_memory.operations) == (2 * 4 * 8 * 16, linear + norm, 3)
    assert slow_memory.seconds == linear + norm
    slow_arithmetic = roofline(graph_module, shapes([x]), Card(flops=1.0, bandwidth=1e12))
    assert slow_arithmetic.seconds == pytest.approx(2 * 4 * 8 * 16)
    assert slow_memory.times(3).bytes == 3 * slow_memory.bytes


def test_a_run_is_the_sum_of_its_stage_calls(pipe: object) -> None:
    fdcompile.optimize(pipe, Config(key_steps=5))
    sample(pipe)
    report = fdcompile.explain(pipe)
    ideal = roofline_report(report, "h100")
    assert ideal.total.flops == report.flops
    assert ideal.stock[1].flops == report.stock_flops
    assert {name: count for name, (count, _) in ideal.stages.items()} == report.stage_calls
    assert ideal.total.seconds > ideal.total.flops / CARDS["h100"].flops
    assert "of stock's least time" in str(ideal)
    with pytest.raises(ValueError, match="roofline='h1': expected one of h100, h200"):
        roofline_report(report, "h1")
