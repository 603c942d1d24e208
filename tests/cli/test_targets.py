"""Whatever a command writes is checked before any work; options that load a pipeline are the same everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from typer.main import get_command

import fdcompile
from fdcompile.cli import loading
from fdcompile.cli.cli import app, main
from fdcompile.cli.options import ModelOptions
from fdcompile.cli.progress import progress_bar

TARGETS = [
    ("plan", "--output", "plan.json"),
    ("plan", "--plot", "plot.png"),
    ("plan", "--report", "report.html"),
    ("demo", "--output", "demo.png"),
    ("demo", "--report", "report.html"),
    ("study", "--output", "study"),
    ("study", "--report", "report.html"),
    ("gate", "--baseline", "gate.json"),
    ("gate", "--junit", "gate.xml"),
    ("evaluate", "--output", "evaluation"),
    ("evaluate", "--report", "report.html"),
    ("generate", "--output", "images"),
    ("export", "--output", "package"),
]
NEEDED = {
    "plan": {"--output": "out.json"},
    "gate": {"--baseline": "out.json", "--update": None},
    "study": {"--output": "out"},
    "evaluate": {"--output": "out"},
    "generate": {"--output": "out", "--prompts": "prompts.txt"},
    "export": {"--output": "out", "--format": "onnx"},
}


@pytest.fixture
def ask(tmp_path: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command with one target, and says why it was refused; nothing may be loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_pipe", lambda *_: pytest.fail("it was loaded"))
    Path("prompts.txt").write_text("a sun\n")

    def run(command: str, option: str, target: str) -> str:
        given = NEEDED.get(command, {}) | {option: target}
        return refusal(command, *(word for pair in given.items() for word in pair if word is not None))

    return run


@pytest.mark.parametrize(("command", "option", "name"), TARGETS)
def test_a_target_whose_folder_is_missing_is_refused(
    command: str, option: str, name: str, ask: Callable[..., str]
) -> None:
    if command in ("evaluate", "generate") and option == "--output":
        pytest.skip("it makes the folders above")
    assert "there is no folder" in ask(command, option, f"nowhere/{name}")


@pytest.mark.parametrize(("command", "option", "name"), TARGETS)
def test_a_target_of_the_other_kind_is_refused(command: str, option: str, name: str, ask: Callable[..., str]) -> None:
    if Path(name).suffix:
        Path(name).mkdir()
        assert "is a folder" in ask(command, option, name)
    else:
        Path(name).write_text("")
        assert any(words in ask(command, option, name) for words in ("is no folder", "exists and is not empty"))


@pytest.mark.parametrize(("command", "option", "name"), TARGETS)
def test_a_target_in_a_folder_that_cannot_be_written_to_is_refused(
    command: str, option: str, name: str, ask: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "is no folder that can be written to" in ask(command, option, name)


def test_each_command_that_runs_a_model_loads_it_with_the_same_options() -> None:
    expected = {f"--{name}" for name in ModelOptions.__dataclass_fields__}
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        options = {option for parameter in command.params for option in parameter.opts}
        assert expected <= options, name


def test_a_scheduler_that_is_nearly_named_right_is_suggested(refusal: Callable[..., str], tmp_path: Path) -> None:
    arguments = ["explain", "--scheduler"]
    assert "did you mean DDIMScheduler" in refusal(*arguments, "DDIMSheduler")
    assert "EulerDiscreteScheduler" in refusal(*arguments, "Euler")
    assert "did you mean EulerDiscreteScheduler" in refusal(*arguments, "Eulr")
    assert "expected one like DDIMScheduler" in refusal(*arguments, "rectified")
    assert "diffusers has none of that name" in refusal(*arguments, "UNet2DConditionModel")


def test_precision_lora_and_variant_reach_the_loader(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loras: list[Any] = []
    monkeypatch.setattr(StableDiffusionPipeline, "load_lora_weights", lambda self, path: loras.append(path))
    pipe = loading.load_pipe(ModelOptions(model, "EulerDiscreteScheduler", "my-lora", None, "bfloat16"))
    assert loras == ["my-lora"]
    assert str(pipe.unet.dtype) == "torch.bfloat16"
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    StableDiffusionPipeline.from_pretrained(model).save_pretrained(tmp_path, variant="fp16")
    assert loading.load_pipe(ModelOptions(str(tmp_path), variant="fp16")).unet is not None


def test_a_checkpoint_that_is_not_there_is_refused(refusal: Callable[..., str]) -> None:
    assert "there is no such file" in refusal("explain", "--model", "nowhere.safetensors")


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    captured = capsys.readouterr()
    assert "Usage: fdcompile" in captured.out
    assert captured.err == ""


def test_the_package_s_directory_is_its_interface() -> None:
    assert [name for name in dir(fdcompile) if not name.startswith("__")] == sorted(fdcompile.__all__)


def test_progress_is_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with progress_bar() as progress:
        for now in (100.0, 101.0, 111.0):
            progress("recording", now / 200)
    assert capsys.readouterr().err.splitlines() == ["  recording (50%)", "  recording (56%)"]
