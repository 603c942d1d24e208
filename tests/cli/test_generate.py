"""fdcompile generate, alone and under torchrun."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cli.conftest import rows
from PIL import Image

from fdcompile.cli.cli import main

HERE = Path(__file__).parent
LINES = ["a red circle", "a blue square", "", "two dots", "a line", "a small sun", "a moon", "some stars"]
OPTIONS = ["--steps", "6", "--key-steps", "0,2"]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(LINES) + "\n")
    return str(path)


def images(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


def manifest(folder: Path) -> list[dict[str, Any]]:
    lines = [line for path in sorted(folder.glob("manifest-*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]


def assert_same_images(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        assert np.abs(actual[name] - expected[name]).max() <= 1, "one step of 255"


@pytest.fixture(scope="module")
def alone(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What one process draws, one image at once."""
    folder = tmp_path_factory.mktemp("alone")
    path = folder / "prompts.txt"
    path.write_text("\n".join(LINES))
    output = folder / "images"
    assert main(["generate", "--model", model, "--prompts", str(path), "--output", str(output), *OPTIONS]) == 0
    return images(output)


def torchrun(count: int, program: list[str], *arguments: str, restarts: int = 0, given: str = "") -> str:
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"]
    command = [*launcher, f"--max-restarts={restarts}", *program, "generate", *arguments]
    result = subprocess.run(command, env=environment, input=given, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_a_batch_draws_the_same_and_a_second_run_nothing(
    model: str, prompts: str, alone: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "images"
    arguments = ["generate", "--model", model, "--prompts", prompts, "--output", str(output), *OPTIONS, "--batch", "4"]
    assert main(arguments) == 0
    assert rows(capsys.readouterr().out)["all"][:2] == ["7", "0"]
    assert_same_images(images(output), alone)
    assert [line["number"] for line in manifest(output)] == [0, 1, 3, 4, 5, 6, 7]
    assert main(arguments) == 0
    assert "0 images made, 7 there before" in capsys.readouterr().out
    assert len(manifest(output)) == 7


@pytest.mark.tables
def test_three_processes_draw_the_same_of_what_is_piped_in(
    model: str, alone: dict[str, np.ndarray], tmp_path: Path
) -> None:
    output = tmp_path / "images"
    arguments = ["--model", model, "--prompts", "-", "--output", str(output), *OPTIONS]
    printed = torchrun(3, ["-m", "fdcompile"], *arguments, given="\n".join(LINES))
    assert_same_images(images(output), alone)
    table = rows(printed)
    assert table["all"][:2] == ["7", "0"]
    assert sorted(int(table[rank][0]) for rank in "012") == [2, 2, 3]


@pytest.mark.tables
def test_where_a_rank_is_killed_the_launcher_finishes_the_job(
    model: str, prompts: str, alone: dict[str, np.ndarray], tmp_path: Path
) -> None:
    output = tmp_path / "images"
    arguments = ["--model", model, "--prompts", prompts, "--output", str(output), *OPTIONS]
    torchrun(2, [str(HERE / "dying_rank.py")], *arguments, restarts=1)
    assert_same_images(images(output), alone)
    made = Counter(line["number"] for line in manifest(output))
    assert made.keys() == {0, 1, 3, 4, 5, 6, 7}
    assert max(made.values()) == 1, "what had its line was not made again"
    assert not list(output.glob(".*.png"))


@pytest.mark.tables
def test_what_an_export_has_written_draws(model: str, prompts: str, tmp_path: Path) -> None:
    package, output = tmp_path / "package", tmp_path / "images"
    export = [
        "export",
        "--output",
        str(package),
        "--format",
        "onnx",
        "--model",
        model,
        "--key-steps",
        "0,2",
        "--batch",
        "2",
    ]
    assert main(export) == 0
    arguments = ["generate", "--model", model, "--prompts", prompts, "--output", str(output), "--steps", "6"]
    assert main([*arguments, "--package", str(package), "--batch", "2"]) == 1, "the last batch is one image"
    failed = [line for line in manifest(output) if "error" in line]
    assert [line["number"] for line in failed] == [7]
    assert "batch: the package has 4 latents" in failed[0]["error"]
    assert len(images(output)) == 6
    assert json.loads((output / "job.json").read_text())["config"]["key_steps"] == [0, 2]


def test_what_is_piped_in_is_read_as_it_comes(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a dot\ncaf\xe9\n")))
    arguments = ["generate", "--model", model, "--prompts", "-", "--output", str(tmp_path / "images"), "--steps", "2"]
    assert main(arguments) == 1, "a line was bad"
    captured = capsys.readouterr()
    assert "line 2: 'utf-8' codec can't decode" in captured.err
    assert rows(captured.out)["all"][:2] == ["1", "1"]
    assert list(images(tmp_path / "images")) == ["00000000.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "nowhere.txt"], "'nowhere.txt': there is no such file"),
        (["--output", "/dev/null/images"], "'/dev/null' is no folder that can be written to"),
        (["--package", "nowhere"], "'nowhere' does not exist"),
        (["--plan", "x.json", "--key-steps", "3"], "--plan has key steps of its own"),
        (["--plan", "x.json"], "No such file or directory: 'x.json'"),
        (["--batch", "0"], "'0': expected a whole number of at least 1"),
        (["--prompts", "/dev/null"], "'/dev/null': there is no such file"),
        (["--key-steps", "0,1,99"], "step 99 is out of range, 50 steps are 0 to 49"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_is_loaded(
    arguments: list[str],
    message: str,
    prompts: str,
    refusal: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fdcompile.cli.loading.load_pipe", lambda *args: pytest.fail("it was loaded"))
    given = {"--prompts": prompts, "--output": str(tmp_path / "images")}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert message in refusal("generate", *(word for pair in given.items() for word in pair))


def test_a_file_without_prompts_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n  \n")
    output = tmp_path / "images"
    assert "there are no prompts in it" in refusal("generate", "--prompts", str(empty), "--output", str(output))
    assert not output.exists()


def test_a_folder_of_another_job_is_refused(
    model: str, prompts: str, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    arguments = ["generate", "--model", model, "--prompts", prompts, "--output", str(tmp_path)]
    assert "holds something else: choose another folder" in refusal(*arguments)
