"""The exact figures: green on the committed baseline, and red when the compiler gets worse."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from models import TEXT, small_unet

from benchmarks import check
from fdcompile import Config

Gate = Callable[[Sequence[str]], int]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gate:
    """The gate for the miniature's graph alone, on a copy of the committed baseline."""
    committed = json.loads(check.BASELINE.read_text())
    copy = tmp_path / "baseline.json"
    copy.write_text(json.dumps({figure: n for figure, n in committed.items() if figure.startswith("miniature /")}))
    monkeypatch.setattr(check, "BASELINE", copy)
    monkeypatch.setattr(check, "all_figures", check.miniature_figures)
    return check.main


@pytest.mark.tables  # as `make bench-check` does, with all figures
def test_the_committed_baseline_is_green(gate: Gate, capsys: pytest.CaptureFixture[str]) -> None:
    status = gate([])
    assert status == 0, capsys.readouterr().out


def test_a_pass_that_does_nothing_is_red(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Config, "paper", functools.partial(Config.paper, disabled_passes=("split_skips",)))
    assert gate([]) == 1
    expected = json.loads(check.BASELINE.read_text())
    total, without = "miniature / 50 steps / FLOPs", "miniature / 50 steps / FLOPs, without split_skips"
    assert f"| {total} | {expected[total]} | {expected[without]} |" in capsys.readouterr().out


def test_a_figure_that_vanished_is_red_until_the_baseline_is_updated(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "all_figures", lambda config: {"some figure": 1})
    assert gate([]) == 1
    output = capsys.readouterr().out
    assert "| some figure | none | 1 |" in output
    assert "| miniature / 50 steps / FLOPs | " in output
    assert gate(["--update"]) == 0
    assert gate([]) == 0


@pytest.mark.tables
def test_weightless_unets_give_the_figures_of_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "OPTIONAL_PASSES", ())
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = small_unet(block_out_channels=(16,), **blocks)
    tokens, _ = TEXT
    real = check.unet_figures("small", unet, tokens, Config.paper())
    assert check.unet_figures("small", check.meta_unet(unet.config), tokens, Config.paper()) == real
