"""bind: labels follow from dataflow and the cut."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from torch import fx
from toy import DECODER, toy_graph

from fdcompile.graph.program import module_path
from fdcompile.graph.text import graph_text
from fdcompile.passes.bind import bind
from fdcompile.passes.simplify import simplify


def labels(graph_module: fx.GraphModule) -> dict[str, list[str]]:
    """Module path to the labels of its operations, in order, repeats collapsed."""
    labels_of: dict[str, list[str]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            label, seen = str(node.meta["binding_time"]), labels_of[module_path(node)]
            if seen[-1:] != [label]:
                seen.append(label)
    return dict(labels_of)


def bound(cut: tuple[str, ...]) -> dict[str, list[str]]:
    graph_module, _ = toy_graph()
    simplify(graph_module)
    assert bind(graph_module, cut)
    assert not bind(graph_module, cut), "labels are the same the second time"
    return labels(graph_module)


def test_golden(golden: Any) -> None:
    graph_module, _ = toy_graph()
    simplify(graph_module)
    assert bind(graph_module, DECODER)
    golden("bind", graph_text(graph_module))


def test_what_holds_no_weights_follows_what_it_reads() -> None:
    labels_of = bound(DECODER)
    assert labels_of["conv_act"] == ["step"]
    assert labels_of["up_blocks.0.conv1"] == ["key"], "recomputed, but sees neither the time nor the latent"


def test_partial_encoder_is_recomputed_before_and_after_the_reused_part() -> None:
    labels_of = bound(("conv_in", *DECODER))
    assert labels_of["conv_in"] == ["step"]
    assert labels_of["down_blocks.0.conv1"] == ["key"]
    assert labels_of["up_blocks.0.conv1"] == ["step"], "its skip is the recomputed conv_in"


def test_empty_cut_reuses_everything_that_reads_the_latent() -> None:
    labels_of = bound(())
    assert "step" not in {label for group in labels_of.values() for label in group}
    assert labels_of["conv_out"] == ["key"]


def test_full_cut_reuses_nothing() -> None:
    labels_of = bound(("conv_in", "down_blocks", *DECODER))
    assert "key" not in {label for group in labels_of.values() for label in group}


@pytest.mark.parametrize("prefix", ["up_block", "conv", "down_blocks.0.conv"])
def test_a_prefix_of_a_name_is_not_a_module(prefix: str) -> None:
    assert bound((prefix,)) == bound(())
