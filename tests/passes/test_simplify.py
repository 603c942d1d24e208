"""simplify: what it removes, what it must keep, and that it tells the truth about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from toy import ops, toy_graph

from fdcompile.graph.text import graph_text
from fdcompile.passes.simplify import simplify


def export(module: nn.Module, *arguments: Tensor) -> fx.GraphModule:
    return torch.export.export(module.eval(), arguments, strict=False).module(check_guards=False)  # type: ignore[return-value]


def test_golden(golden: Any) -> None:
    graph_module, call = toy_graph()
    expected = graph_module(*call.tensors)
    before = ops(graph_module)
    for removed in ("_assert_tensor_metadata.default", "dropout.default", "div.Tensor", "expand.default"):
        assert removed in before
    assert simplify(graph_module)
    golden("simplify", graph_text(graph_module))
    assert torch.equal(graph_module(*call.tensors)[0], expected[0])


def test_no_change_the_second_time() -> None:
    graph_module, _ = toy_graph()
    assert simplify(graph_module)
    assert not simplify(graph_module)


class Keep(nn.Module):
    """Looks like an identity and is none."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "scale":
                return x / 2.0
            case "negate":
                return x * -1
            case "cast":
                return x.to(torch.float64)
            case "expand":
                return x.expand(3, 2, 4)
            case "slice":
                return x[:, 1:]
            case "promote":
                return x.to(torch.int64) / 1.0
        return x.view(4, 2)


@pytest.mark.parametrize("kind", ["scale", "negate", "cast", "expand", "slice", "promote", "view"])
def test_what_changes_a_value_stays(kind: str) -> None:
    x = torch.randn(1, 2, 4) if kind != "view" else torch.randn(2, 4)
    graph_module = export(Keep(kind), x)
    simplify(graph_module)
    assert ops(graph_module)
    torch.testing.assert_close(graph_module(x), Keep(kind)(x), rtol=0, atol=0)


def test_a_view_of_a_view_is_one_view() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.view(8).view(4, 2) + 1, x.view(8).view(2, 4) + 1

    x = torch.randn(2, 4)
    graph_module = export(Views(), x)
    assert simplify(graph_module)
    assert ops(graph_module) == ["reshape.default", "add.Tensor", "add.Tensor"]
    for actual, expected in zip(graph_module(x), Views()(x), strict=True):
        assert torch.equal(actual, expected)


def test_dropout_in_training_stays() -> None:
    graph_module = torch.export.export(nn.Dropout(0.5).train(), (torch.ones(8),), strict=False).module(
        check_guards=False
    )
    assert isinstance(graph_module, fx.GraphModule)
    simplify(graph_module)
    assert ops(graph_module) == ["dropout.default"]
