"""The pass driver: order, checks between passes, and what a failure says and leaves."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from toy import DECODER, toy_graph

import fdcompile
from fdcompile.errors import PassError
from fdcompile.graph.program import BindingTime
from fdcompile.graph.text import graph_text
from fdcompile.passes import DUMP_VARIABLE, PASSES, Pass, driver, run_pass, run_passes
from fdcompile.passes.driver import VERIFY_VARIABLE
from fdcompile.passes.simplify import simplify

aten = torch.ops.aten


def with_broken(monkeypatch: pytest.MonkeyPatch, name: str, run: Callable[..., bool]) -> tuple[Pass, ...]:
    """The table, in which `run` stands for pass `name`; `run_pass` finds it there, too."""
    table = tuple(Pass(row.name, run, row.requires, row.ensures) if row.name == name else row for row in PASSES)
    monkeypatch.setattr(driver, "PASSES", table)
    return table


def raises(graph_module: fx.GraphModule, cut: Any) -> bool:
    raise ZeroDivisionError("on purpose")


def lines_of(message: str) -> str:
    """What the message says to run."""
    return textwrap.dedent(message.partition("to run it alone:\n")[2])


def test_a_failing_pass_names_itself_and_its_predecessors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path))
    graph_module, _ = toy_graph()
    with pytest.raises(PassError) as caught:
        run_passes(graph_module, DECODER, (*PASSES, Pass("divide", raises)))
    message = str(caught.value)
    assert "pass 'divide' failed: ZeroDivisionError: on purpose" in message
    assert "passes before it: simplify, bind, split_skips (no change)\n" in message
    text = tmp_path / "1" / "failed_divide.txt"
    assert str(text) in message
    assert "conv2d" in text.read_text()


@pytest.mark.parametrize("name", [row.name for row in PASSES])
def test_the_lines_of_the_message_run_the_pass_alone_to_the_same_error(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    given: list[str] = []

    def fails(graph_module: fx.GraphModule, cut: Any) -> bool:
        given.append(f"{graph_text(graph_module)} {cut}")
        raise ZeroDivisionError("on purpose")

    with pytest.raises(PassError) as caught:
        run_passes(toy_graph()[0], DECODER, with_broken(monkeypatch, name, fails))
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        exec(lines_of(str(caught.value)))
    assert len(given) == 2
    assert given[0] == given[1], "the pass is given the graph that it was given before"


def test_a_failing_partition_can_be_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "partition", lambda graph_module: raises(graph_module, ()))
    with pytest.raises(PassError, match="pass 'partition' failed: ZeroDivisionError") as caught:
        run_passes(toy_graph()[0], DECODER)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        exec(lines_of(str(caught.value)))


def test_a_failing_forecast_can_be_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "forecast_features", lambda program: raises(program, ()))
    with pytest.raises(
        PassError, match=r"pass 'forecast_features' failed: (.|\n)*split_skips \(no change\), partition"
    ) as caught:
        run_passes(toy_graph()[0], DECODER, forecast=True)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        exec(lines_of(str(caught.value)))


def test_a_pass_that_is_not_there_cannot_be_run_alone() -> None:
    with pytest.raises(ValueError, match=r"'divide' is no pass: expected one of \['capture', 'simplify', "):
        run_pass("divide", toy_graph()[0], DECODER)


def find(graph_module: fx.GraphModule, target: Any) -> fx.Node:
    return next(iter(graph_module.graph.find_nodes(op="call_function", target=target)))


def forgets_a_label(graph_module: fx.GraphModule, cut: Any) -> bool:
    del find(graph_module, aten.silu.default).meta["binding_time"]
    return True


def labels_too_early(graph_module: fx.GraphModule, cut: Any) -> bool:
    nodes = graph_module.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    nodes[-1].meta["binding_time"] = BindingTime.PROMPT
    return True


def brings_dropout_back(graph_module: fx.GraphModule, cut: Any) -> bool:
    node = find(graph_module, aten.silu.default)
    with graph_module.graph.inserting_after(node):
        unused = graph_module.graph.call_function(aten.dropout.default, (node, 0.1, False))
    unused.meta = dict(node.meta)
    return True


def forgets_metadata(graph_module: fx.GraphModule, cut: Any) -> bool:
    del find(graph_module, aten.silu.default).meta["val"]
    return True


def writes_in_place(graph_module: fx.GraphModule, cut: Any) -> bool:
    find(graph_module, aten.add.Tensor).target = aten.add_.Tensor
    return True


def reads_what_comes_later(graph_module: fx.GraphModule, cut: Any) -> bool:
    first, *_, last = graph_module.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    first.replace_input_with(first.args[0], last)
    return True


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (forgets_a_label, r"'silu' \(aten.silu.default\) is not labeled"),
        (labels_too_early, r"'conv2d_5' is labeled \[prompt\], earlier than 'silu_2' \[step\], which it reads"),
        (brings_dropout_back, r"nothing reads 'dropout\w*'"),
        (forgets_metadata, r"'silu' \(aten.silu.default\) has no 'val' metadata"),
        (writes_in_place, r"'add' \(aten.add_.Tensor\) writes to its input"),
        (reads_what_comes_later, "used before it has been defined"),
    ],
)
def test_the_pass_that_broke_the_graph_is_named(
    monkeypatch: pytest.MonkeyPatch, breaks: Callable[..., bool], message: str
) -> None:
    monkeypatch.delenv(VERIFY_VARIABLE)  # these rules hold always
    table = with_broken(monkeypatch, "split_skips", breaks)
    with pytest.raises(PassError, match=rf"pass 'split_skips' failed: \w+: (.|\n)*{message}") as caught:
        run_passes(toy_graph()[0], DECODER, table)
    assert "passes before it: simplify, bind\n" in str(caught.value)


def test_a_graph_that_capture_broke_is_reported_before_the_first_pass() -> None:
    graph_module, _ = toy_graph()
    writes_in_place(graph_module, ())
    with pytest.raises(PassError, match=r"pass 'capture' failed: (.|\n)*passes before it: none"):
        run_passes(graph_module, DECODER)


def test_order_is_asserted() -> None:
    graph_module, _ = toy_graph()
    with pytest.raises(PassError, match=r"pass 'split_skips' failed.*needs \['bound'\]"):
        run_passes(graph_module, DECODER, PASSES[::-1])


def relabels(graph_module: fx.GraphModule, cut: Any) -> bool:
    _, second, *_ = graph_module.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    second.meta["binding_time"] = BindingTime.STEP  # too late, which is no error
    return False


@pytest.mark.parametrize(
    ("lies", "message"),
    [
        (lambda graph_module, cut: True, "reports modified, but made: no change"),
        (lambda graph_module, cut: simplify(graph_module) and False, "reports no change, but made: .*removed"),
        (relabels, "reports no change, but made: 1 relabeled"),
    ],
)
def test_a_pass_is_held_to_what_it_says_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, lies: Callable[..., bool], message: str
) -> None:
    graph_module, _ = toy_graph()
    table = (*PASSES[:2], Pass("lie", lies)) if lies is relabels else (Pass("lie", lies),)
    with pytest.raises(PassError, match=f"pass 'lie' failed: VerificationError: {message}"):
        run_passes(graph_module, DECODER, table)
    monkeypatch.delenv(VERIFY_VARIABLE)
    run_passes(graph_module, DECODER, (*PASSES, Pass("harmless", lambda graph_module, cut: True)))


def test_metadata_that_a_pass_gets_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def transposes(graph_module: fx.GraphModule, cut: Any) -> bool:
        node = find(graph_module, aten.silu.default)
        with graph_module.graph.inserting_after(node):
            swapped = graph_module.graph.call_function(aten.transpose.int, (node, 0, 1))
        swapped.meta = dict(node.meta)
        node.replace_all_uses_with(swapped, delete_user_cb=lambda user: user is not swapped, propagate_meta=False)
        return True

    with pytest.raises(PassError, match=r"'transpose\w*' \(aten.transpose.int\) is .*, but its metadata says "):
        run_passes(toy_graph()[0], DECODER, with_broken(monkeypatch, "split_skips", transposes))


def test_passes_do_what_they_say_on_a_real_unet_with_each_cut(captured: fx.GraphModule) -> None:
    for cut in (fdcompile.DECODER, fdcompile.PARTIAL_ENCODER, fdcompile.deep_feature_caching(3), (), ("down_blocks",)):
        run_passes(captured, cut)


def test_every_pass_leaves_nothing_for_itself_to_do(captured: fx.GraphModule, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path))
    twice = [copy for row in PASSES for copy in (row, Pass(f"{row.name}_again", row.run))]
    run_passes(captured, fdcompile.DECODER, tuple(twice))
    heads = [path.read_text().partition(",")[0] for path in sorted((tmp_path / "1").glob("*_again.txt"))]
    assert heads == [f"# {row.name}_again: no change" for row in PASSES]


def test_binding_times_print_as_the_design_calls_them() -> None:
    assert [str(time) for time in BindingTime] == [
        *("static", "schedule", "prompt", "schedule+prompt", "latent", "key", "key before", "step")
    ]
