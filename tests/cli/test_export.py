"""fdcompile export."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import fdcompile
from fdcompile.cli.cli import main
from fdcompile.package.manifest import Manifest

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


def test_export_writes_a_package_that_loads(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "package"
    options = [
        "--model",
        model,
        "--key-steps",
        "0,2",
        "--batch",
        "1,1,2",
        "--parallel-steps",
        "2",
        "--precision",
        "float32",
    ]
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always", FutureWarning)
        assert main(["export", "--output", str(folder), "--format", "onnx", *options]) == 0
    printed = capsys.readouterr()
    assert "writing stage decoder" in printed.err
    assert all(line.startswith("  ") for line in printed.err.splitlines()), "what is being done, and nothing else"
    assert not shown
    assert str(folder) in printed.out
    pipe = fdcompile.load(StableDiffusionPipeline.from_pretrained(model), folder)
    pipe(["a red circle", "a blue square"], num_inference_steps=6, output_type="latent")
    report = fdcompile.explain(pipe)
    assert (report.key_steps, report.decoder_calls, report.stock_calls) == ((0, 2), 3, 0)


@pytest.mark.tables
def test_export_leaves_nothing_when_interrupted(tmp_path: Path) -> None:
    """Ctrl-C in the middle of writing."""
    script = (
        "import os, signal, sys\n"
        "from fdcompile.backends.onnx import Onnx\n"
        "from fdcompile.cli.cli import main\n"
        "interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "Onnx.write = lambda self, stages, folder, progress: ((folder / 'x').touch(), interrupt())\n"
        "sys.exit(main(['export', '--output', 'package', '--format', 'onnx', '--parallel-steps', '2']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    *told, last = done.stderr.splitlines()
    assert last == "fdcompile: interrupted"
    assert all(line.startswith("  ") for line in told)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "zip"], "'zip' is not one of 'aot_inductor', 'onnx', 'tensorrt', 'tensorrt_onnx'"),
        (["--precision", "int8", "--format", "onnx"], "'int8' is not one of 'float32', 'float16', 'bfloat16'"),
        (["--height", "0", "--format", "onnx"], "'0': expected a number, or smallest,usual,largest"),
        ([], "Missing option '--format'"),
    ],
)
def test_export_refuses(options: list[str], message: str, refusal: Callable[..., str]) -> None:
    assert message in refusal("export", "--output", "package", *options)


def test_export_refuses_a_size_that_would_not_be_made(tmp_path: Path, refusal: Callable[..., str]) -> None:
    error = refusal("export", "--output", str(tmp_path / "package"), "--format", "onnx", "--height", "64")
    assert error.startswith("height=64: StableDiffusionPipeline would make an image of 32x32 pixels")
    assert list(tmp_path.iterdir()) == []


def test_export_looks_for_what_it_needs_before_it_loads(
    tmp_path: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fdcompile.cli.loading.load_pipe", lambda *arguments: pytest.fail("it was loaded"))
    (tmp_path / "mine").touch()
    assert "is not empty: choose another" in refusal("export", "--output", str(tmp_path), "--format", "onnx")
    assert "there is no folder" in refusal("export", "--output", str(tmp_path / "no" / "package"), "--format", "onnx")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if "onnx" in name else find_spec(name))
    package = str(tmp_path / "package")
    assert refusal("export", "--output", package, "--format", "onnx").startswith("ONNX packages need onnx, onnxscript")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if "tensorrt" in name else find_spec(name))
    assert "pip install 'fdcompile[tensorrt]'" in refusal("export", "--output", package, "--format", "tensorrt")


def test_export_refuses_targets(tmp_path: Path, refusal: Callable[..., str]) -> None:
    package = str(tmp_path / "package")
    pytest.importorskip("tensorrt_rtx")
    error = refusal("export", "--output", package, "--format", "tensorrt_rtx", "--target", "sm89,rtx4090")
    assert error == "target=rtx4090: expected some of sm75, sm80, sm86, sm89, sm120, sm121"
    error = refusal("export", "--output", package, "--format", "onnx", "--target", "sm89")
    assert error == "target=sm89: only tensorrt_rtx and tensorrt_rtx_refit build for chosen GPUs"


@pytest.mark.tables
def test_the_miniature_becomes_engines_for_a_card_that_is_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("FDCOMPILE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "package"
    options = ["--format", "tensorrt_rtx", "--precision", "float16", "--target", "sm86,sm89,sm120"]
    assert main(["export", "--output", str(folder), *options]) == 0
    assert "the engines were not run" in capsys.readouterr().err
    manifest = Manifest.read(folder)
    manifest.check_files(folder)
    assert manifest.description["targets"] == ["sm86", "sm89", "sm120"]
    assert manifest.made_with["tensorrt_rtx"] == trt.__version__
    engines = {path.stem: path.stat().st_size for path in folder.glob("*.engine")}
    assert engines.keys() == manifest.stages.keys()
    pipe = fdcompile.load_miniature(torch.float16)
    assert sum(engines.values()) > sum(tensor.nbytes for tensor in pipe.unet.parameters()), "they hold the weights"
    with pytest.raises(fdcompile.PackageError, match="needs an NVIDIA RTX GPU"):
        fdcompile.load(pipe, folder)


@pytest.mark.parametrize("value", ["0", "3,2,1", "1,2", "many"])
def test_export_refuses_ranges(value: str, refusal: Callable[..., str]) -> None:
    error = refusal("export", "--output", "package", "--format", "onnx", "--batch", value)
    assert f"{value!r}: expected a number, or smallest,usual,largest" in error
