"""fdcompile study."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fdcompile.cli import loading, options
from fdcompile.cli.cli import main


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a square\na red circle\n")
    return path


def test_a_study_is_made_printed_drawn_and_written(
    model: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "study"
    options = ["--prompts", str(prompts), "--steps", "3", "--scheduler", "EulerDiscreteScheduler"]
    page = tmp_path / "study.html"
    assert main(["study", "--model", model, *options, "--output", str(output), "--report", str(page)]) == 0
    assert page.read_text().count('<img src="data:image/png;base64,') == 3
    assert {path.name for path in output.iterdir()} == {"study.json", "changes.png", "norms.png", "components.png"}
    values = json.loads((output / "study.json").read_text())
    assert values["made_for"] == {"pipeline": "StableDiffusionPipeline", "scheduler": "EulerDiscreteScheduler"}
    assert "| E_8 | " in capsys.readouterr().out


def test_bad_input_is_refused_before_the_model_is_loaded(
    model: str, prompts: Path, tmp_path: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["study", "--model", model, "--prompts", str(prompts)]
    monkeypatch.setattr(loading, "load_pipe", lambda *_: pytest.fail("it was loaded"))
    assert "is no folder that can be written to" in refusal(*arguments, "--output", str(prompts))
    assert "there is no folder" in refusal(*arguments, "--output", str(tmp_path / "no" / "study"))
    assert "expected the name of a file such as report.html" in refusal(
        *arguments, "--output", str(tmp_path / "study"), "--report", "study.txt"
    )
    assert "--prompts is required" in refusal(*arguments[:3], "--output", str(tmp_path / "study"))
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    assert "pip install 'fdcompile[evaluate]'" in refusal(*arguments, "--output", str(tmp_path / "study"))
    assert list(tmp_path.iterdir()) == [prompts]
