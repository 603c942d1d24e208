"""The command line: what it refuses, what it prints, what it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from models import TEXT, small_pipe, small_text_encoder
from PIL import Image
from transformers import CLIPTokenizer

import fdcompile
from fdcompile.command.cli import main
from fdcompile.command.metrics import psnr, ssim


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small pipeline of random weights that takes prompts."""
    folder = tmp_path_factory.mktemp("model")
    tokens = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    pipe = small_pipe()
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT[0])
    pipe.register_modules(tokenizer=tokenizer, text_encoder=small_text_encoder(tokenizer))
    pipe.save_pretrained(folder / "pipe")
    return str(folder / "pipe")


def rows(table: str) -> dict[str, list[str]]:
    """Rows of the demo's table by name; cells are two spaces or more apart."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in table.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if cells}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["paint"], "invalid choice"),
        (["demo", "--key-steps", "often"], "'often': expected paper, all, a stride or steps"),
        (["demo", "--key-steps", "0,1,"], "expected paper, all, a stride or steps"),
        (["demo", "--key-steps", "1,2"], "must begin with 0"),
        (["demo", "--key-steps", "0,5,3"], "strictly increasing"),
        (["demo", "--key-steps", "0"], "stride must be at least 1"),
        (["demo", "--fresh", "nothing"], "encoder-propagation"),
        (["demo", "--max-parallel-steps", "0"], "whole number of at least 1"),
        (["demo", "--steps", "many"], "whole number of at least 1"),
        (["demo", "--guidance", "nan"], "expected a number"),
        (["demo", "--seed", "-1"], "whole number of at least 0"),
        (["demo", "--backend", "abacus"], "expected one of auto"),
        (["demo", "--output", "picture.txt"], "picture file"),
        (["demo", "--output", "no-such-folder/demo.png"], "there is no folder 'no-such-folder'"),
        (["explain", "--output", "demo.png"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


def test_refuses_a_folder_without_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model_index.json" in refusal(["demo", "--model", str(tmp_path)], capsys)
    assert "there is no such folder" in refusal(["explain", "--model", str(tmp_path / "nowhere")], capsys)


def test_refuses_a_key_step_after_the_last(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(["demo", "--model", model, "--steps", "8", "--key-steps", "0,8"], capsys)
    assert error == "fdcompile: error: key_steps=[0, 8]: step 8 is out of range, this run has 8 steps (0 to 7)"


def test_refuses_more_prompts_than_fit(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "at most 16" in refusal(["demo", "--model", model, *["--prompt", "a"] * 17], capsys)


def test_refuses_a_pipeline_without_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    assert "DDPMPipeline takes no prompt" in refusal(["demo", "--model", str(tmp_path)], capsys)


def test_demo_compares_stock_and_optimised(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "demo.png"
    options = ["--steps", "6", "--key-steps", "0,1,3", "--max-parallel-steps", "8", "--output", str(picture)]
    assert main(["demo", "--model", model, "--prompt", "a red circle", "--prompt", "a square", *options]) == 0
    captured = capsys.readouterr()
    table = rows(captured.out)
    assert table["encoder runs"] == ["6", "3"]
    assert table["decoder evaluations"] == ["6 in 6 calls", "6 in 3 calls"]
    for name in ("GFLOP per image", "time of a pipeline call", "PSNR to stock, median", "SSIM to stock, median"):
        assert name in table
    assert "scenes read correctly" not in table  # only the miniature has a checker
    assert "optimised, timed 3 of 3" in captured.err
    with Image.open(picture) as image:
        assert image.size == (260 + 3 * 174, 56 + 2 * 174)  # label and 3 tiles of 160 + 14; header and 2 rows


def test_demo_of_the_miniature_reads_its_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = "a striped red circle left of a blue square on a green background"
    options = ["--steps", "2", "--key-steps", "all", "--output", str(tmp_path / "demo.png")]
    assert main(["demo", "--prompt", scene, *options]) == 0
    table = rows(capsys.readouterr().out)
    assert float(table["SSIM to stock, median"][0]) == 1
    stock, optimised = table["scenes read correctly"]
    assert stock == optimised
    assert stock in ("0 of 1", "1 of 1")


def test_explain_prints_stages_and_report(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--fresh", "deep-feature-caching", "--steps", "4", "--key-steps", "2"]
    assert main(["explain", "--model", model, *options]) == 0
    printed = capsys.readouterr().out
    for stage in ("schedule (", "prompt (", "shallow (", "encoder (", "decoder ("):
        assert f"\n{stage}" in printed
    assert "fresh: conv_in, down_blocks.0, up_blocks.2, conv_norm_out" in printed
    assert rows(printed)["key steps"] == ["0 2"]


def batch(*values: int) -> Any:
    return np.stack([np.full((8, 8, 3), value, np.uint8) for value in values])


def test_metrics_judge_picture_by_picture() -> None:
    distances = psnr(batch(10, 30), batch(10, 20))
    assert distances[0] == math.inf
    assert distances[1] == pytest.approx(20 * math.log10(255 / 10))
    similarities = ssim(batch(10, 30), batch(10, 20))
    assert similarities[0] == 1
    assert 0 < similarities[1] < 1


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_metrics_refuse_what_cannot_be_compared(metric: Any) -> None:
    with pytest.raises(ValueError, match="of one shape"):
        metric(batch(1, 2), batch(1))
    with pytest.raises(ValueError, match="uint8"):
        metric(batch(1).astype(np.float32), batch(1).astype(np.float32))


def test_export_writes_a_package_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "package"
    options = ["--key-steps", "0,2", "--batch", "1,1,2", "--parallel-steps", "2", "--precision", "float32"]
    assert main(["export", str(folder), "--format", "onnx", *options]) == 0
    printed = capsys.readouterr()
    assert "writing stage decoder" in printed.err
    assert str(folder) in printed.out
    pipe = fdcompile.load(fdcompile.load_miniature(), folder)
    pipe(["a red circle", "a blue square"], num_inference_steps=6, output_type="latent")
    report = fdcompile.explain(pipe)
    assert (report.key_steps, report.decoder_calls, report.full_calls) == ((0, 2), 3, 0)
    assert main(["export", str(folder), "--format", "onnx"]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "3,2,1", "1,2", "many"])
def test_export_refuses_ranges(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "package", "--format", "onnx", "--batch", value])
    assert f"{value!r}: expected a number, or smallest,usual,largest" in capsys.readouterr().err
