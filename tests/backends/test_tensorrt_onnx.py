"""Engines by TensorRT's ONNX parser, up to the parser, the builder and the GPU, which onnxruntime stands in for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_engines
import pytest
import torch
from models import TEXTS, flat_pipe, lora, sample, small_xl_pipe
from package.conftest import edit

import fdcompile
from fdcompile import Config, PackageError
from fdcompile.backends import (
    engine,
    engine_cache,
    package_format,
    tensorrt,
    tensorrt_onnx,
    tensorrt_rtx,
    tensorrt_rtx_refit,
)
from fdcompile.backends.stored import StageExport
from fdcompile.capture.export import capture_widest
from fdcompile.graph.ranges import Range
from fdcompile.package.export import check_package
from fdcompile.package.manifest import Manifest
from fdcompile.package.stages import stage_exports
from fdcompile.passes import run_passes
from fdcompile.pipeline.record import record_call


@pytest.fixture(autouse=True, scope="module")
def _stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", onnx_engines.module())
        patch.setenv(engine_cache.CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        patch.setattr(tensorrt_onnx, "check_tensorrt", lambda: None)
        patch.setattr(engine, "_side_stream", lambda d: contextlib.nullcontext(SimpleNamespace(cuda_stream=7)))
        patch.setattr(tensorrt, "CudaGraphs", lambda run, weights, device: run)
        yield


def export(folder: Path) -> Path:
    pipe = fdcompile.optimize(flat_pipe(), Config.paper())
    return fdcompile.export(pipe, folder, format="tensorrt_onnx", arguments=TEXTS, batch=(1, 1, 3))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("packages") / "package")


@pytest.fixture(scope="module")
def decoder() -> StageExport:
    call = record_call(pipe := flat_pipe(), None, None, TEXTS)
    _, captured = capture_widest(pipe.unet, call)
    return stage_exports(run_passes(captured, Config.paper().recompute), Range(1, 2, 6), Range(1, 3, 16))[-1]


@pytest.fixture(scope="module")
def xl_prompt() -> StageExport:
    texts = TEXTS | {f"{name.replace('prompt', 'pooled_prompt')}": text[:, 0] for name, text in TEXTS.items()}
    (pipe := small_xl_pipe()).unet.half()
    arguments = {name: text.half() for name, text in texts.items()} | {"height": 8, "width": 8}
    call = record_call(pipe, None, None, arguments)
    _, captured = capture_widest(pipe.unet, call)
    program = run_passes(captured, Config.paper().recompute)
    program = replace(program, stages={"prompt": program.stages["prompt"]})
    return stage_exports(program, Range(1, 2, 6), Range(1, 3, 16))[0]


def write(stage: StageExport, folder: Path) -> None:
    folder.mkdir()
    tensorrt_onnx.FORMAT.write([stage], folder, lambda line: None)


def assert_draws_as(pipe: Any, twin: Any, **arguments: Any) -> None:
    expected = sample(fdcompile.optimize(twin, Config.paper(max_parallel_steps=16)), **arguments)
    torch.testing.assert_close(sample(pipe, **arguments), expected, rtol=0, atol=1e-3)


def test_engines_draw_what_the_optimized_pipe_does(package: Path) -> None:
    pipe, twin = fdcompile.load(flat_pipe(), package), flat_pipe()
    for arguments in ({"batch": 1}, {"batch": 3, "steps": 20}, {"guidance": 1.0}):
        assert_draws_as(pipe, twin, **arguments)
    assert fdcompile.explain(pipe).stock_calls == 0


def test_engines_follow_a_lora_that_comes_and_goes(package: Path) -> None:
    """Fused, taken out and another one fused: each time all weights are the pipeline's, and nothing is built."""
    pipe, twin = fdcompile.load(flat_pipe(), package), flat_pipe()
    assert_draws_as(pipe, twin)
    before = sample(pipe)
    onnx_engines.built.clear()
    for seed in (1, 2):
        for each in (pipe, twin):
            each.load_lora_weights(lora(flat_pipe().unet, seed, scale=0.1))
            each.fuse_lora()
            each.unload_lora_weights()
        assert_draws_as(pipe, twin)
        assert (sample(pipe) - before).abs().max() > 1e-2
    with torch.no_grad():
        for each in (pipe, twin):
            each.unet.load_state_dict(flat_pipe().unet.state_dict())
            each.unet.up_blocks[0].resnets[0].conv1.weight.mul_(1.1)  # of which two stages hold a half each
    assert_draws_as(pipe, twin)
    assert onnx_engines.built == []


def test_a_pipeline_with_other_weights_takes_the_engines_too(package: Path) -> None:
    pipe, twin = flat_pipe(), flat_pipe()
    with torch.no_grad():
        for each in (pipe, twin):
            each.unet.conv_out.weight.mul_(1.5)
    assert_draws_as(fdcompile.load(pipe, package), twin)


def test_every_weight_of_the_unet_is_in_one_engine_and_in_whole(package: Path) -> None:
    manifest = Manifest.read(package)
    unet = flat_pipe().unet
    weights = [weight for stage in manifest.stages.values() for weight in stage.weights]
    covered = dict.fromkeys((weight.path for weight in weights), 0)
    for weight in weights:
        covered[weight.path] += weight.of(unet).numel()
    assert covered == {name: parameter.numel() for name, parameter in unet.named_parameters()}


def test_an_engine_that_keeps_an_old_weight_is_refused(
    decoder: StageExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_engines, "dropped", {"unet.conv_out.bias"})
    monkeypatch.setenv(engine_cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    write(decoder, tmp_path / "package")
    with pytest.raises(RuntimeError, match=r"cannot be refitted with unet\.conv_out\.bias: export again"):
        check_package(tensorrt_onnx.FORMAT, [decoder], tmp_path / "package", torch.device("cpu"))


def test_an_engine_that_is_off_is_not_exported(
    xl_prompt: StageExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = onnx_engines.Context.execute_async_v3

    def run_badly(self: Any, stream: int) -> bool:
        self._outputs = {name: values * np.float16(1.1) for name, values in self._outputs.items()}
        return run(self, stream)

    monkeypatch.setattr(onnx_engines.Context, "execute_async_v3", run_badly)
    write(xl_prompt, tmp_path / "package")
    with pytest.raises(PackageError, match=r"stage prompt as written differs from its graph by .*e-0"):
        check_package(tensorrt_onnx.FORMAT, [xl_prompt], tmp_path / "package", torch.device("cpu"))


def test_what_was_built_before_is_not_built_again(
    decoder: StageExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(engine_cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    onnx_engines.built.clear()
    for number in range(2):
        write(decoder, tmp_path / f"{number}")
    assert onnx_engines.built == ["decoder"]
    assert (tmp_path / "0/decoder.engine").read_bytes() == (tmp_path / "1/decoder.engine").read_bytes()

    weights = decoder.weights | {"unet.conv_out.bias": decoder.weights["unet.conv_out.bias"] + 1}
    higher = tuple((low, usual, torch.Size([2 * high[0], *high[1:]])) for low, usual, high in decoder.shapes)
    for number, other in enumerate((replace(decoder, weights=weights), replace(decoder, shapes=higher)), start=2):
        write(other, tmp_path / f"{number}")
    assert onnx_engines.built == ["decoder"] * 3, "where a weight or the profile differs"
    (timings,) = (tmp_path / "cache").glob("*.timings")
    assert timings.read_bytes() == b"ttt", "each build goes on where the one before ended"

    monkeypatch.setattr(engine_cache, "_MOST_BYTES", 2 * len((tmp_path / "0/decoder.engine").read_bytes()))
    cache = engine_cache.EngineCache("TensorRTOnnx", {"tensorrt": "another"})
    assert cache.get(decoder, lambda: b"another TensorRT's") == b"another TensorRT's"
    assert len(list((tmp_path / "cache").glob("*.engine"))) == 2, "those used last"
    assert cache.get(decoder, lambda: b"") == b"another TensorRT's"


@pytest.mark.parametrize("format", ["onnx", "tensorrt_onnx", "tensorrt_rtx"])
def test_sdxl_in_float16_joins_its_texts_and_sizes(format: str, xl_prompt: StageExport, tmp_path: Path) -> None:
    """Float16 texts with float32 sizes: ONNX has no such operation, torch has."""
    if format == "tensorrt_rtx":
        pytest.importorskip("tensorrt_rtx")
    written = package_format(format)
    written.write([xl_prompt], tmp_path, lambda line: None)
    if format == "tensorrt_rtx":  # which has compared it before it built an engine
        assert (tmp_path / "prompt.engine").stat().st_size > 1000
    else:
        check_package(written, [xl_prompt], tmp_path, torch.device("cpu"))


class TestOfTensorRTForRTX:
    """Refittable engines, which the real builder of TensorRT for RTX makes on a machine with a GPU only."""

    @pytest.fixture(autouse=True)
    def _rtx(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", onnx_engines.module("tensorrt_rtx"))
        monkeypatch.setattr(tensorrt_rtx_refit.TensorRTRTXRefit, "check", lambda self: None)
        monkeypatch.setattr(tensorrt_rtx, "invalidity", lambda header, device: "")

    def test_they_hold_no_weights(self, xl_prompt: StageExport, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setenv(engine_cache.CACHE_VARIABLE, str(tmp_path / "cache"))
        (folder := tmp_path / "package").mkdir()
        written = tensorrt_rtx_refit.FORMAT
        written.write([xl_prompt], folder, lambda line: None)
        check_package(written, [xl_prompt], folder, torch.device("cpu"))
        with pytest.raises(PackageError, match="stage prompt as written differs from its graph by nan"):
            check_package(replace(written, weights="held"), [xl_prompt], folder, torch.device("cpu"))
        monkeypatch.setattr(onnx_engines.Network, "mark_weights_refittable", lambda self, name: "to_k" not in name)
        monkeypatch.setenv(engine_cache.CACHE_VARIABLE, str(tmp_path / "another"))
        with pytest.raises(RuntimeError, match=r"'prompt': the parsed network has no weights unet.*to_k.* to refit"):
            written.write([xl_prompt], folder, lambda line: None)

    def test_they_take_those_of_the_pipeline(self, package: Path, tmp_path: Path) -> None:
        """At load, whatever they are, and once they are others."""
        (folder := tmp_path / "package").mkdir()
        for path in package.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        headers = tensorrt_rtx_refit.FORMAT.describe(folder)
        made_with = {"tensorrt_rtx": onnx_engines.module().__version__}
        edit(
            folder, lambda values: values.update(format="tensorrt_rtx_refit", made_with=made_with, description=headers)
        )
        pipe, twin = flat_pipe(), flat_pipe()
        for number in range(2):
            with torch.no_grad():
                for each in (pipe, twin):
                    each.unet.conv_out.weight.mul_(1.5)
            if number == 0:
                fdcompile.load(pipe, folder)
            assert_draws_as(pipe, twin)
