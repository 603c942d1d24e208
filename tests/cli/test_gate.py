"""fdcompile gate: green on its own baseline, red when figures or images got worse."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import fdcompile
from fdcompile.cli import loading
from fdcompile.cli.cli import main
from fdcompile.measure.timing import Pairs
from fdcompile.runtime import compiled_runner
from fdcompile.tools.gate import baseline, measure
from fdcompile.version import versions

Gate = Callable[..., int]


@pytest.fixture(scope="module")
def twins() -> Iterator[Any]:
    """One pipeline and one twin for all, because a UNet is captured for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_pipe", functools.lru_cache(loading.load_pipe))
        cached = functools.lru_cache(measure.clone)
        patch.setattr(measure, "clone", cached)
        patch.setattr(measure, "time_pairs", lambda *_: Pairs((0.5, 0.6, 0.7), (1.0, 1.0, 1.0)))
        yield cached


@pytest.fixture(scope="module")
def gate(twins: Any, model: str, tmp_path_factory: pytest.TempPathFactory) -> Gate:
    """Runs the command beside a baseline that is its own."""
    path = tmp_path_factory.mktemp("gate") / "gate.json"

    def run(*options: str, key_steps: str = "0,1,3") -> int:
        asked = ["--model", model, "--prompt", "a square", "--steps", "6", "--key-steps", key_steps]
        return main(["gate", *asked, "--baseline", str(path), *options])

    assert run("--update") == 0
    assert json.loads(path.read_text())["exact"]["encoder runs"] == 3
    return run


def test_its_own_baseline_is_green(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, junit = tmp_path / "summary.md", tmp_path / "gate.xml"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert gate("--junit", str(junit)) == 0
    output = capsys.readouterr().out
    assert "figures are as in" in output
    assert "Time of an optimized call: 0.60 of stock (median of 3 pairs)." in output
    assert output.strip() in summary.read_text()
    (suite,) = ElementTree.parse(junit).getroot()
    assert suite.get("failures") == "0"
    assert int(suite.get("tests") or 0) == len(suite) > 50


def test_a_key_step_taken_away_is_red(gate: Gate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    junit = tmp_path / "gate.xml"
    assert gate("--junit", str(junit), key_steps="0,3") == 1
    output = capsys.readouterr().out
    assert "| encoder runs | 3 | 2 |" in output
    assert "--update" in output
    failed = {case.get("name") for case in ElementTree.parse(junit).iter("testcase") if len(case)}
    assert {"encoder runs", "encoder / calls", "FLOPs"} <= failed
    assert "latent PSNR to stock with every step a key step, dB" not in failed


def test_versions_that_differ_are_named_where_figures_do(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(baseline, "versions", lambda: versions() | {"torch": "99.0"})
    assert gate() == 0
    assert "99.0" not in capsys.readouterr().out
    assert gate(key_steps="0,3") == 1
    output = capsys.readouterr().out
    assert f"Made with other versions: torch {versions()['torch']} then, 99.0 now." in output


def test_a_pass_left_out_is_red(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without = functools.partial(fdcompile.Config, disabled_passes=("split_skips",))
    monkeypatch.setattr(fdcompile, "Config", without, raising=False)
    assert gate() == 1
    output = capsys.readouterr().out
    assert "| FLOPs | " in output
    assert "| encoder runs" not in output
    assert measure.EXACTNESS not in output, "it is exact with and without"


def test_slower_than_stock_is_a_warning(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "time_pairs", lambda *_: Pairs((1.1, 1.2, 1.3), (1.0, 1.0, 1.0)))
    assert gate() == 0
    assert "WARNING: slower than stock" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(tmp_path: Path, refusal: Callable[..., str], model: str) -> None:
    missing = tmp_path / "none.json"
    assert refusal("gate", "--baseline", str(missing)) == f"there is no {missing}: write it with --update"
    other = tmp_path / "other.json"
    other.write_text('{"some": 1}')
    assert "is no baseline of fdcompile gate" in refusal("gate", "--baseline", str(other))
    other.write_text('{"schema": 7, "asked": {}, "exact": {}, "fidelity": {}}')
    assert "has schema 7, expected 1" in refusal("gate", "--baseline", str(other))
    assert "there is no folder" in refusal("gate", "--baseline", str(tmp_path / "no" / "gate.json"), "--update")


def test_a_baseline_for_another_question_is_refused(gate: Gate, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate("--seed", "3") == 2
    assert "the baseline is for seed 0, not 3: ask for the same" in capsys.readouterr().err


def test_a_pass_that_is_slightly_inexact_is_red_though_all_counts_are_equal(
    gate: Gate, twins: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_passes = compiled_runner.run_passes

    def inexact(*args: Any, **kwargs: Any) -> Any:
        program = run_passes(*args, **kwargs)
        for node in program.stages["decoder"].graph_module.graph.nodes:
            if "group_norm" in str(node.target):
                node.args = (*node.args[:4], 1e-3)
        program.stages["decoder"].graph_module.recompile()
        return program

    twins.cache_clear()
    monkeypatch.setattr(compiled_runner, "run_passes", inexact)
    assert gate() == 1
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table[1:]] == [f"| {measure.EXACTNESS}"]
