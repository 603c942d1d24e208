"""What is asked of export and load is checked before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import TEXT, TEXTS, flat_pipe, small_xl_pipe

import fdcompile
from fdcompile import Config
from fdcompile.graph.ranges import Range
from fdcompile.pipeline.record import record_call

XL_TEXTS = {
    "prompt_embeds": torch.zeros(1, *TEXT),
    "negative_prompt_embeds": torch.zeros(1, *TEXT),
    "pooled_prompt_embeds": torch.zeros(1, TEXT[1]),
    "negative_pooled_prompt_embeds": torch.zeros(1, TEXT[1]),
}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"format": "zip"}, ValueError, r"format='zip': expected one of aot_inductor, onnx, tensorrt"),
        (
            {"format": "onnx", "batch": (2, 1, 3)},
            ValueError,
            r"batch=\(2, 1, 3\): expected an int",
        ),
        ({"format": "onnx", "parallel_steps": 0}, ValueError, r"parallel_steps=0"),
        (
            {"format": "onnx", "precision": torch.float16},
            ValueError,
            r"precision=torch\.float16: .* torch\.float32",
        ),
        ({"format": "onnx", "arguments": {"color": 1}}, ValueError, r"StableDiffusionPipeline takes no color"),
        ({"format": "onnx", "height": 16}, ValueError, r"height=16: StableDiffusionPipeline would make .* 8x8 pixels"),
        ({"format": "onnx", "width": 16}, ValueError, r"width=16: .* give both"),
        ({"format": "onnx", "arguments": TEXTS | {"height": 16}}, ValueError, r"height=16: .* give both"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fdcompile.runtime.graph_cache.capture_widest", lambda *arguments: pytest.fail("it was captured")
    )
    with pytest.raises(error, match=message):
        fdcompile.export(flat_pipe(), tmp_path / "package", **{"arguments": TEXTS} | arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_size_asked_for_is_the_size_captured() -> None:
    pipe = fdcompile.load_miniature()
    factor = pipe.vae_scale_factor
    for size in ({"height": 64}, {"width": 64}):
        with pytest.raises(ValueError, match="=64: StableDiffusionPipeline would make an image of 32x32 pixels"):
            record_call(pipe, size.get("height"), size.get("width"), None)
    assert record_call(pipe, 64, 48, None).tensors[0].shape[2:] == (64 // factor, 48 // factor)
    assert record_call(pipe, 32, None, None).tensors[0].shape[2:] == (32 // factor, 32 // factor)
    assert record_call(small_xl_pipe(), 16, None, XL_TEXTS).tensors[0].shape[2:] == (16, 8)  # it takes one alone


def test_swapped_arguments_are_named(tmp_path: Path) -> None:
    pipe = flat_pipe()
    with pytest.raises(TypeError, match=r"directory is a StableDiffusionPipeline.*fdcompile\.load\(pipe, 'directory'"):
        fdcompile.load(str(tmp_path), pipe)
    with pytest.raises(TypeError, match=r"expected a path: fdcompile\.export\(pipe, 'directory'"):
        fdcompile.export(str(tmp_path), pipe, format="onnx")


def test_a_function_for_key_steps_is_refused_before_any_work(tmp_path: Path) -> None:
    pipe = fdcompile.optimize(flat_pipe(), Config(key_steps=lambda n: (0,)))
    with pytest.raises(ValueError, match=r"key_steps=<function .*: a function cannot be written"):
        fdcompile.export(pipe, tmp_path / "package", format="onnx", arguments=TEXTS)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_holds_something_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        fdcompile.export(flat_pipe(), tmp_path, format="onnx", arguments=TEXTS)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        fdcompile.export(flat_pipe(), tmp_path / "no" / "package", format="onnx", arguments=TEXTS)


@pytest.mark.parametrize("value", [True, "3", (1, 2), (0, 1, 2), (1, 2, 1.5), None])
def test_range_refuses(value: Any) -> None:
    with pytest.raises(ValueError, match=r"steps=.*expected an int, or \(min, opt, max\)"):
        Range.parse("steps", value)
