"""One package for many sizes, and several packages."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FLAT, TEXTS, flat_pipe, sample, small_pipe, small_unet
from package.conftest import edit

import fdcompile
from fdcompile import CaptureError, Config, PackageError
from fdcompile.backends.engine_build import build_engine
from fdcompile.backends.stored import StageExport
from fdcompile.capture.export import capture
from fdcompile.graph.program import BindingTime, TensorSpec
from fdcompile.graph.ranges import Range
from fdcompile.package.manifest import Manifest
from fdcompile.package.sizes import any_size
from fdcompile.package.stages import stage_exports
from fdcompile.passes import run_passes
from fdcompile.pipeline.record import record_call

SIZES = ((8, 8), (32, 24))

HALVING = FLAT | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 8),
}


def halving_pipe() -> Any:
    """Stable Diffusion with the least UNet that halves its latents: ranges of sizes take long to export."""
    pipe = small_pipe()
    pipe.register_modules(unet=small_unet(**HALVING))
    return pipe


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For 8 to 32 rows and 8 to 24 columns, which the UNet halves once."""
    folder = tmp_path_factory.mktemp("packages") / "onnx"
    sizes: dict[str, Any] = {"height": (8, 16, 32), "width": (8, 8, 24), "batch": (1, 1, 3)}
    pipe = fdcompile.optimize(halving_pipe(), Config.paper())
    return fdcompile.export(pipe, folder, format="onnx", arguments=TEXTS, **sizes)


@pytest.fixture(scope="module")
def twin() -> Any:
    return fdcompile.optimize(halving_pipe(), Config.paper(max_parallel_steps=16))


def test_one_package_equals_eager_at_any_size(onnx: Path, twin: Any) -> None:
    pipe = fdcompile.load(halving_pipe(), onnx)
    for number, (height, width) in enumerate(SIZES, start=1):
        batch = 1 + number % 2
        actual, expected = (sample(each, batch=batch, height=height, width=width) for each in (pipe, twin))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        report, eager = fdcompile.explain(pipe), fdcompile.explain(twin)
        assert report.stock_calls == 0
        assert report.programs_held == number
        assert (report.stock_flops, report.stage_flops["decoder"]) == (eager.stock_flops, eager.stage_flops["decoder"])


def test_the_manifest_names_its_units(onnx: Path) -> None:
    manifest = Manifest.read(onnx)
    assert manifest.sides is not None
    assert (manifest.sides.latent_height, manifest.sides.latent_width) == (Range(8, 16, 32), Range(8, 8, 24))
    assert (manifest.sides.latent_multiple, manifest.sides.pixels_per_latent) == (2, 1)
    assert (manifest.latents, manifest.parallel_steps) == (Range(1, 2, 6), Range(1, 3, 16))
    assert manifest.stages["schedule"].sampling_steps == Range(1, 50, 1000)
    assert manifest.stages["decoder"].parallel_steps == Range(1, 3, 16)
    assert manifest.stages["encoder"].parallel_steps is manifest.stages["encoder"].sampling_steps is None
    feature = manifest.stages["decoder"].inputs[0]
    assert feature.shape[2:] == ("H/2", "W/2")


def test_profiles_carry_the_sizes(onnx: Path) -> None:
    lines = (onnx / "decoder.trtexec.txt").read_text().splitlines()
    options = dict(line[2:].split("=", 1) for line in lines if "=" in line)
    first = Manifest.read(onnx).stages["decoder"].inputs[0]
    for kind, latents, rows, columns in (("min", 1, 4, 4), ("opt", 2, 8, 4), ("max", 6, 16, 12)):
        shapes = dict(shape.split(":") for shape in options[f"{kind}Shapes"].split(","))
        assert shapes[first.name] == f"{latents}x{first.shape[1]}x{rows}x{columns}"


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs fdcompile[tensorrt-rtx]")
def test_engines_for_the_sizes_are_built(onnx: Path) -> None:
    """By TensorRT for RTX, of the very graphs: float32, with attention that is taken apart."""
    import tensorrt_rtx as trt

    profiles = []
    for name, packaged in Manifest.read(onnx).stages.items():
        lines = (onnx / f"{name}.trtexec.txt").read_text().splitlines()
        low, usual, high = (
            [torch.Size(map(int, shape.split(":")[1].split("x"))) for shape in line.split("=")[1].split(",")]
            for line in lines
            if "Shapes=" in line
        )
        shapes = tuple(zip(low, usual, high, strict=True))
        examples = tuple(torch.empty(shape) for shape in usual)
        stage = StageExport(name, None, examples, shapes, {}, packaged)  # type: ignore[arg-type]
        engine = build_engine(trt, stage, onnx / f"{name}.onnx", lambda network, config: None)
        assert engine[:4] == b"vtrt"
        profiles.append((name, shapes[0][0], shapes[0][2]))
    assert profiles[-1] == ("decoder", (1, 8, 4, 4), (6, 8, 16, 12))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 40, "width": 8}, r"height=40: it takes 8 to 32 in steps of 2"),
        ({"height": 8, "width": 32}, r"width=32: it takes 8 to 24 in steps of 2"),
    ],
)
def test_a_size_outside_is_refused_by_name(onnx: Path, size: dict[str, int], message: str) -> None:
    pipe = fdcompile.load(halving_pipe(), onnx)
    with pytest.raises(PackageError, match=message):
        sample(pipe, **size)


def test_or_the_stock_unet_answers_it(onnx: Path) -> None:
    pipe, stock = fdcompile.load(halving_pipe(), onnx, fallback="stock"), halving_pipe()
    assert torch.equal(sample(pipe, height=40, width=8), sample(stock, height=40, width=8))
    report = fdcompile.explain(pipe)
    (reason,) = report.stock_reasons
    assert "height=40: it takes 8 to 32" in reason
    assert "not counted: the stock UNet ran" in str(report)
    assert "0.00" not in str(report).partition("features held")[0]
    sample(pipe)
    assert fdcompile.explain(pipe).stock_calls == 0


def test_and_so_while_its_modules_or_weights_are_others(onnx: Path) -> None:
    pipe, stock = fdcompile.load(halving_pipe(), onnx, fallback="stock"), halving_pipe()
    sample(pipe)
    for each in (pipe, stock):
        each.enable_freeu(0.9, 0.2, 1.2, 1.4)
    assert torch.equal(sample(pipe), sample(stock))
    (reason,) = fdcompile.explain(pipe).stock_reasons
    assert "modules have changed since they were exported" in reason
    pipe = fdcompile.load(halving_pipe(), onnx, fallback="stock")
    pipe.unet.conv_in.weight.data *= 2
    sample(pipe)
    (reason,) = fdcompile.explain(pipe).stock_reasons
    assert "weights have changed since the package was loaded" in reason


def test_of_several_packages_the_one_for_the_size_answers(onnx: Path, copy: Path, twin: Any) -> None:
    def narrow(values: dict[str, Any]) -> None:
        values["sides"]["latent_height"] |= {"min": 24, "opt": 24}

    edit(copy, narrow)
    pipe = fdcompile.load(halving_pipe(), copy)
    with pytest.raises(PackageError, match=r"height=8: it takes 24 to 32"):
        sample(pipe)
    fdcompile.load(pipe, [copy, str(onnx)])
    for size in ({"height": 8, "width": 8}, {"height": 24, "width": 8}):
        torch.testing.assert_close(sample(pipe, **size), sample(twin, **size), rtol=0, atol=1e-3)
    with pytest.raises(PackageError, match=r"1\. height=40: it takes 24 to 32 .*; 2\. height=40: it takes 8 to 32"):
        sample(pipe, height=40, width=8)


def test_packages_of_different_configurations_want_one(onnx: Path, copy: Path) -> None:
    edit(copy, lambda values: values["config"].update(key_steps=[0, 4]))
    with pytest.raises(PackageError, match=r"exported with different configurations: choose one, load\(config="):
        fdcompile.load(halving_pipe(), [onnx, copy])
    sample(fdcompile.load(halving_pipe(), [onnx, copy], Config(key_steps=3)))


@pytest.mark.parametrize(
    ("given", "message"),
    [({"fallback": "eager"}, "fallback='eager': expected 'raise' or 'stock'"), ({"directory": []}, "one or more")],
)
def test_bad_arguments_of_load(onnx: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fdcompile.load(halving_pipe(), **{"directory": onnx} | given)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"height": (7, 8, 9), "width": 8}, r"height=\(7, 8, 9\): where a side has a range, all are multiples of 2"),
        ({"height": (2, 8, 8), "width": 8}, r"a smallest one is 4 or more"),
        ({"height": (16, 8, 8)}, r"height=\(16, 8, 8\): expected an int, or \(min, opt, max\)"),
        ({"width": "64"}, r"width='64': expected an int"),
    ],
)
def test_bad_ranges_are_refused_before_any_work(
    sizes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fdcompile.runtime.graph_cache.capture_widest", lambda *arguments: pytest.fail("it was captured")
    )
    with pytest.raises(ValueError, match=message):
        fdcompile.export(halving_pipe(), tmp_path / "package", format="onnx", arguments=TEXTS, **sizes)


def fixed_by_a_table(pipe: Any) -> None:
    """As a learned position embedding."""
    table = torch.nn.Parameter(torch.randn(1, 16, 8, 8))

    class ConvIn(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + table

    pipe.unet.conv_in.__class__ = ConvIn


def test_an_architecture_that_fixes_its_size_says_so(tmp_path: Path) -> None:
    pipe = halving_pipe()
    fixed_by_a_table(pipe)
    with pytest.raises(CaptureError, match="cannot be exported for several sizes, try one height and width"):
        fdcompile.export(pipe, tmp_path / "package", format="onnx", arguments=TEXTS, height=(8, 8, 16), width=8)
    assert list(tmp_path.iterdir()) == []


def changed_argument(pipe: Any) -> Callable[..., Any]:
    """A pipe that tells its UNet the height as a number."""
    call = type(pipe).__call__

    @functools.wraps(call)
    def told(self: Any, *args: Any, height: int, **kwargs: Any) -> Any:
        return call(self, *args, height=height, cross_attention_kwargs={"rows": height}, **kwargs)

    return told


def test_a_pipeline_that_calls_its_unet_otherwise_for_another_size_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = flat_pipe()
    monkeypatch.setattr(type(pipe), "__call__", changed_argument(pipe))
    call = record_call(pipe, 8, 8, TEXTS)
    with pytest.raises(ValueError, match="height=16: the UNet is not called with the same arguments as at 8"):
        any_size(pipe, call, Range(8, 8, 16), Range(8, 8, 8), TEXTS)


def test_one_side_alone_may_have_a_range() -> None:
    pipe = flat_pipe()
    call = record_call(pipe, 8, 16, TEXTS)
    sizes = any_size(pipe, call, None, Range(8, 16, 24), TEXTS)
    assert sizes is not None
    program = run_passes(capture(pipe.unet, call, sizes=sizes), Config.paper().recompute)
    assert program.inputs[0].shape == ("B", 4, 8, "W")
    program.stages = {"encoder": program.stages["encoder"]}
    (stage,) = stage_exports(program, Range(1, 2, 2), Range(1, 2, 3), sizes.sides)
    for value, (low, _, high) in zip(stage.packaged.inputs, stage.shapes, strict=True):
        if "W" in value.shape:
            axis = value.shape.index("W") - len(value.shape)
            assert (low[axis], high[axis]) == (8, 24)


def test_sizes_are_spelled_and_read_back() -> None:
    value = TensorSpec("x", ("2*B", 3, "H/4", "H*W/16"), torch.float32, BindingTime.LATENT)
    assert value.size_for(3, sides=(8, 16)) == (6, 3, 2, 8)
    assert value.multiple() == 16
