"""The pass driver: order, verification, and what a failure says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from toy import DECODER, toy_graph

from fdcompile.graph.program import BindingTime
from fdcompile.passes import DUMP_VARIABLE, PASSES, Pass, PassError, run_passes
from fdcompile.passes.verify import VerificationError, verify_graph, verify_program


def broken(graph_module: fx.GraphModule, cut: Any) -> bool:
    raise ZeroDivisionError("on purpose")


def test_a_failing_pass_names_itself_its_predecessors_and_a_dump(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path))
    graph_module, _ = toy_graph()
    with pytest.raises(PassError) as caught:
        run_passes(graph_module, DECODER, (*PASSES, Pass("divide", broken)))
    message = str(caught.value)
    assert "pass 'divide' failed: ZeroDivisionError: on purpose" in message
    assert "passes before it: simplify, bind, split_skips (no change), share_guidance" in message
    dump = tmp_path / "failed_divide.txt"
    assert str(dump) in message
    assert "conv2d" in dump.read_text()


def test_order_is_asserted() -> None:
    graph_module, _ = toy_graph()
    with pytest.raises(PassError, match=r"pass 'share_guidance' failed.*needs \['bound'\]"):
        run_passes(graph_module, DECODER, PASSES[::-1])


def test_every_intermediate_can_be_dumped(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path))
    graph_module, _ = toy_graph()
    run_passes(graph_module, DECODER)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "0_captured.txt", "1_simplify.txt", "2_bind.txt", "3_split_skips.txt", "4_share_guidance.txt",
        "5_decoder.txt", "5_prompt.txt", "5_schedule.txt", "5_shared.txt",
    ]  # fmt: skip
    assert "dropout" in (tmp_path / "0_captured.txt").read_text()
    assert "dropout" not in (tmp_path / "1_simplify.txt").read_text()


def test_verifier_refuses_a_graph_that_writes_to_its_inputs() -> None:
    graph_module, _ = toy_graph()
    node = next(node for node in graph_module.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    node.target = torch.ops.aten.add_.Tensor
    with pytest.raises(PassError, match=r"'add' \(aten.add_.Tensor\) writes to its input"):
        run_passes(graph_module, DECODER)


def test_verifier_refuses_inputs_without_a_binding_time() -> None:
    graph_module, _ = toy_graph()
    placeholder = next(node for node in graph_module.graph.nodes if node.op == "placeholder")
    del placeholder.meta["binding_time"]
    with pytest.raises(VerificationError, match="'sample' has no binding time"):
        verify_graph(graph_module)


def test_verifier_refuses_a_stage_that_reads_what_nothing_produces() -> None:
    graph_module, _ = toy_graph()
    program = run_passes(graph_module, DECODER)
    del program.stages["schedule"]
    with pytest.raises(VerificationError, match="stage 'shared' reads"):
        verify_program(program)


def test_verifier_refuses_stages_out_of_order() -> None:
    graph_module, _ = toy_graph()
    program = run_passes(graph_module, DECODER)
    program.stages = dict(reversed(program.stages.items()))
    with pytest.raises(VerificationError, match="not in the order"):
        verify_program(program)


def test_binding_times_print_as_the_design_calls_them() -> None:
    assert [str(time) for time in BindingTime] == [
        *("static", "schedule", "prompt", "schedule+prompt", "latent", "key, shared", "key", "key before", "step")
    ]
