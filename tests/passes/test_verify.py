"""The rules by which programs are checked; those for graphs are seen at work in `test_driver.py`."""

from __future__ import annotations

import pytest
import torch
from toy import DECODER, toy_graph

from fdcompile.passes import PASSES, run_passes
from fdcompile.passes.verify import FACTS, VerificationError, verify, verify_program


def test_every_fact_of_the_table_has_a_rule() -> None:
    assert frozenset().union(*(row.requires | row.ensures for row in PASSES)) <= FACTS.keys()


def test_inputs_without_a_binding_time_are_refused() -> None:
    graph_module, _ = toy_graph()
    placeholder = next(node for node in graph_module.graph.nodes if node.op == "placeholder")
    del placeholder.meta["binding_time"]
    with pytest.raises(VerificationError, match="'sample' has no binding time"):
        verify(graph_module, {"functional"})


def test_what_an_assertion_returns_needs_no_metadata() -> None:
    graph_module, _ = toy_graph()
    timestep = graph_module.graph.find_nodes(op="placeholder")[1]
    with graph_module.graph.inserting_after(timestep):
        size = graph_module.graph.call_function(torch.ops.aten.sym_size.int, (timestep, 0))
    size.meta["val"] = timestep.meta["val"].shape[0]
    with graph_module.graph.inserting_after(size):
        graph_module.graph.call_function(torch.ops.aten._assert_scalar.default, (size, "no batch"))
    verify(graph_module, {"functional"})
    assert "_assert_scalar" not in str(run_passes(graph_module, DECODER).graph_module.graph)


def test_a_stage_that_reads_what_nothing_produces_is_refused() -> None:
    graph_module, _ = toy_graph()
    program = run_passes(graph_module, DECODER)
    del program.stages["schedule"]
    with pytest.raises(VerificationError, match="stage 'encoder' reads"):
        verify_program(program)


def test_stages_out_of_order_are_refused() -> None:
    graph_module, _ = toy_graph()
    program = run_passes(graph_module, DECODER)
    program.stages = dict(reversed(program.stages.items()))
    with pytest.raises(VerificationError, match="not in the order"):
        verify_program(program)
