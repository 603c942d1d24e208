"""fdcompile explain."""

from __future__ import annotations

import pytest
from cli.conftest import rows

from fdcompile.cli.cli import main

STAGES = ("schedule (", "prompt (", "shallow (", "encoder (", "decoder (")


@pytest.mark.parametrize("verbose", [False, True])
def test_explain_prints_the_report_and_only_if_asked_the_program(
    model: str, verbose: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--recompute",
        "deep-feature-caching",
        "--steps",
        "4",
        "--key-steps",
        "2",
        *["--verbose", "--roofline", "h100"] * verbose,
    ]
    assert main(["explain", "--model", model, *options]) == 0
    printed = capsys.readouterr().out
    assert [f"\n{stage}" in f"\n{printed}" for stage in STAGES] == [verbose] * len(STAGES)
    assert ("hoisted to" in printed) == verbose
    assert ("h100, half precision: at least" in printed) == verbose
    assert "recompute: conv_in, down_blocks.0, up_blocks.1, conv_norm_out" in printed
    assert rows(printed)["key steps"] == ["0 2"]
    if not verbose:
        assert len(printed.splitlines()) <= 20


def test_a_card_that_is_not_known_is_refused_before_anything_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--roofline", "h1"]) != 0
    assert "h1: expected one of h100, h200" in " ".join(capsys.readouterr().err.split())
