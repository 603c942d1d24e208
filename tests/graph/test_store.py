"""A stored graph is the graph again, without its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx

import fdcompile
from fdcompile.graph.store import load_graph, save_graph
from fdcompile.graph.text import graph_text
from fdcompile.passes import run_passes


@pytest.mark.parametrize("bound", [False, True])
def test_a_graph_loads_as_it_was_and_compiles_to_the_same_program(
    captured: fx.GraphModule, tmp_path: Path, bound: bool
) -> None:
    expected = run_passes(captured, fdcompile.DECODER)
    graph_module = expected.graph_module if bound else captured
    save_graph(graph_module, tmp_path / "x.graph")
    loaded = load_graph(tmp_path / "x.graph")
    assert graph_text(loaded) == graph_text(graph_module)
    if not bound:
        program = run_passes(loaded, fdcompile.DECODER)
        assert str(program) == str(expected)
        assert graph_text(program.graph_module) == graph_text(expected.graph_module)


def test_weights_are_stored_by_type_shape_and_device_alone(captured: fx.GraphModule, tmp_path: Path) -> None:
    save_graph(captured, tmp_path / "x.graph")
    loaded = load_graph(tmp_path / "x.graph")
    stored, original = dict(loaded.named_parameters()), dict(captured.named_parameters())
    assert stored.keys() == original.keys()
    for name, weight in stored.items():
        like = original[name]
        assert (weight.shape, weight.dtype, weight.device) == (like.shape, like.dtype, like.device)
        assert weight.untyped_storage().nbytes() == weight.element_size()
    assert not torch.equal(original["unet.conv_in.weight"], stored["unet.conv_in.weight"])
