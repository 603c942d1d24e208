"""Export a pipeline, load it in a new process, and all that can be wrong with a package in between."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from models import TEXTS, assert_equal, flat_pipe, lora, sample
from package.conftest import edit
from package.run_package import MODELS, draw, draw_all, small

import fdcompile
from fdcompile import DECODER, CaptureError, Config, PackageError, Planned
from fdcompile.package.manifest import FILE, Manifest

HERE = Path(__file__).parent
RANGES: dict[str, Any] = {"height": (16, 32, 64), "width": (16, 32, 64)}


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Those of `small`, optimized and eager."""
    return draw_all(fdcompile.optimize(small(), Config.paper(max_parallel_steps=16)))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small` for AOTInductor, in as few stages as may be: each takes long to compile."""
    folder = tmp_path_factory.mktemp("packages") / "aot_inductor"
    pipe = fdcompile.optimize(small(), Config.paper())
    return fdcompile.export(pipe, folder, format="aot_inductor", batch=(1, 2, 2), **RANGES)


def check_in_a_new_process(package: Path, images: list[np.ndarray], scratch: Path, model: str = "small") -> None:
    output, cache = scratch / "images.npz", scratch / "cache"
    command = [sys.executable, str(HERE / "run_package.py"), model, str(package), str(output)]
    no_compiler = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    result = subprocess.run(command, env=os.environ | no_compiler, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for actual, expected in zip(np.load(output).values(), images, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-3)
    assert not list(cache.glob("**/*.cpp")), "something was compiled"


def test_aot_inductor_draws_the_same_images_in_a_new_process(
    archive: Path, images: list[np.ndarray], tmp_path: Path
) -> None:
    check_in_a_new_process(archive, images, tmp_path)


@pytest.mark.tables
def test_onnx_draws_the_same_images_in_a_new_process(images: list[np.ndarray], tmp_path: Path) -> None:
    pipe = fdcompile.optimize(small(), Config.paper())
    package = fdcompile.export(pipe, tmp_path / "package", format="onnx", batch=(1, 2, 2), **RANGES)
    check_in_a_new_process(package, images, tmp_path)


@pytest.mark.tables
@pytest.mark.parametrize("model", ["miniature", "large"])
@pytest.mark.parametrize("format", ["aot_inductor", "onnx"])
def test_a_model_draws_the_same_images_in_a_new_process(format: Any, model: str, tmp_path: Path) -> None:
    """The miniature at its own size, and a package for 256 to 768 pixels at three."""
    build = MODELS[model]
    ranges = {"height": (256, 512, 768), "width": (256, 512, 768)} if model == "large" else {}
    images = draw_all(fdcompile.optimize(build(), Config.paper(max_parallel_steps=16)), model)
    pipe = fdcompile.optimize(build(), Config.paper())
    package = fdcompile.export(pipe, tmp_path / "package", format=format, batch=(1, 2, 2), **ranges)
    check_in_a_new_process(package, images, tmp_path, model)


@pytest.mark.tables
@pytest.mark.parametrize(("format", "recompute"), [("aot_inductor", ()), ("onnx", DECODER)])
def test_a_package_carries_its_plan_into_a_new_process(format: Any, recompute: tuple[str, ...], tmp_path: Path) -> None:
    pipe = small()
    pipe.scheduler.set_timesteps(20)
    key_steps = (0, 1, 3, 6, 10, 15)
    weights = [(1.0, 0.0) if step in key_steps else (1.6, -0.6) for step in range(20)]
    plan = Planned(tuple(pipe.scheduler.timesteps.tolist()), key_steps, tuple(weights), (3.0, 3.0))
    config = Config.paper(plan=plan, recompute=recompute, max_parallel_steps=16)
    images = draw(fdcompile.optimize(pipe, config))
    assert fdcompile.explain(pipe).held == {}
    package = fdcompile.export(pipe, tmp_path / "package", format=format, batch=(1, 2, 2))
    check_in_a_new_process(package, [images], tmp_path, "planned")
    loaded = fdcompile.load(small(), package)
    np.testing.assert_allclose(draw(loaded), images, rtol=0, atol=1e-3)
    report = fdcompile.explain(loaded)
    assert (report.key_steps, report.held, report.decoder_calls) == (key_steps, {}, len(key_steps))


def test_aot_inductor_reads_dense_parts_of_weights(archive: Path) -> None:
    weights = [weight for stage in Manifest.read(archive).stages.values() for weight in stage.weights]
    in_part = {weight.path for weight in weights if weight.part is not None}
    assert in_part
    assert in_part.isdisjoint(weight.path for weight in weights if weight.part is None)


def test_aot_inductor_follows_weights_without_a_new_build(archive: Path, images: list[np.ndarray]) -> None:
    """What fusing an adapter does: weights are written to, or replaced by others at another address."""
    pipe = fdcompile.load(small(), archive)
    np.testing.assert_allclose(draw(pipe), images[0], rtol=0, atol=1e-3)
    twin = fdcompile.optimize(small(), Config.paper(max_parallel_steps=16))
    for each in (pipe, twin):
        each.unet.up_blocks[0].resnets[0].conv1.weight.data *= 2
        linear = next(module for name, module in each.unet.named_modules() if name.endswith("attn1.to_q"))
        linear.weight.data = linear.weight.data * 2
    after = draw(pipe)
    np.testing.assert_allclose(after, draw(twin), rtol=0, atol=1e-3)
    assert np.abs(after - images[0]).max() > 1e-2


def test_aot_inductor_follows_a_fused_lora(archive: Path) -> None:
    """Loaded it is refused, because it adds modules; fused and unloaded it is the UNet's weights."""
    pipe = fdcompile.load(small(), archive)
    twin = fdcompile.optimize(small(), Config.paper(max_parallel_steps=16))
    before = draw(pipe)
    for each in (pipe, twin):
        each.load_lora_weights(lora(small().unet, seed=0, scale=0.1), adapter_name="own")
    with pytest.raises(PackageError, match=r"pipe\.fuse_lora\(\); pipe\.unload_lora_weights\(\)"):
        draw(pipe)
    for each in (pipe, twin):
        each.fuse_lora()
        each.unload_lora_weights()
    after = draw(pipe)
    np.testing.assert_allclose(after, draw(twin), rtol=0, atol=1e-3)
    assert np.abs(after - before).max() > 1e-2


@pytest.mark.usefixtures("few_key_steps_suffice")
def test_a_package_of_the_default_draws_what_the_default_does(tmp_path: Path) -> None:
    package = fdcompile.export(flat_pipe(), tmp_path / "package", format="onnx", arguments=TEXTS)
    pipe, twin = fdcompile.load(flat_pipe(), package), fdcompile.optimize(flat_pipe())
    for steps in (10, 12):
        assert_equal(sample(pipe, steps), sample(twin, steps))
    report, expected = fdcompile.explain(pipe), fdcompile.explain(twin)
    assert (report.key_steps, report.forecast, report.held) == (expected.key_steps, "auto", {})
    assert (report.encoder_runs, report.decoder_calls, report.stock_calls) == (6, 6, 0)


def test_any_batch_and_step_count_in_range(onnx: Path) -> None:
    pipe = fdcompile.load(flat_pipe(), onnx)
    twin = fdcompile.optimize(flat_pipe(), Config.paper(max_parallel_steps=16))
    for arguments in ({"batch": 1}, {"batch": 3, "steps": 20}, {"batch": 2, "guidance": 1.0}, {"guidance": 1.0}):
        torch.testing.assert_close(sample(pipe, **arguments), sample(twin, **arguments), rtol=0, atol=1e-3)
    report = fdcompile.explain(pipe)
    assert report.stock_calls == 0
    assert (report.flops, report.stock_flops) == (fdcompile.explain(twin).flops, fdcompile.explain(twin).stock_flops)
    fdcompile.restore(pipe)
    assert torch.equal(sample(pipe), sample(flat_pipe()))


def test_stages_serve_other_key_steps_than_were_exported(onnx: Path) -> None:
    pipe, twin = fdcompile.load(flat_pipe(), onnx, Config(key_steps=(0, 2, 5))), flat_pipe()
    fdcompile.optimize(twin, Config(key_steps=(0, 2, 5), max_parallel_steps=16))
    torch.testing.assert_close(sample(pipe), sample(twin), rtol=0, atol=1e-3)
    assert fdcompile.explain(pipe).key_steps == (0, 2, 5)
    schedule = tuple(pipe.scheduler.timesteps.tolist())
    fdcompile.load(pipe, onnx, Config.paper(plan=Planned(schedule, (0, 4), None, None)))
    sample(pipe)
    assert fdcompile.explain(pipe).key_steps == (0, 4)


def test_stages_of_another_cut_or_without_a_forecast_are_refused(onnx: Path) -> None:
    pipe = fdcompile.optimize(flat_pipe(), Config(key_steps=4))
    with pytest.raises(
        PackageError, match=r"another configuration: recompute: the package has \('up_blocks'.*, the pipe \(\)"
    ):
        fdcompile.load(pipe, onnx, Config.paper(recompute=()))
    with pytest.raises(PackageError, match="forecasts: the package has False, the pipe True"):
        fdcompile.load(pipe, onnx, Config.paper(forecast="linear"))
    with pytest.raises(TypeError, match=r"config=3: expected a fdcompile\.Config"):
        fdcompile.load(pipe, onnx, 3)  # type: ignore[arg-type]
    sample(pipe)
    assert fdcompile.explain(pipe).key_steps == (0, 4, 8), "what was optimized before stays so"


def test_trtexec_profile(onnx: Path) -> None:
    """Smallest, usual and largest shapes; the decoder's steps and latents are axes of their own."""
    stage = Manifest.read(onnx).stages["decoder"]
    options = dict(
        line[2:].split("=", 1) for line in (onnx / "decoder.trtexec.txt").read_text().splitlines() if "=" in line
    )
    names = [port.name for port in stage.inputs]
    stepwise = next(port.name for port in stage.inputs if port.time.value.startswith("schedule"))
    for kind, steps, latents in (("min", 1, 1), ("opt", 3, 2), ("max", 16, 6)):
        shapes = dict(shape.split(":") for shape in options[f"{kind}Shapes"].split(","))
        assert list(shapes) == names
        assert shapes[stepwise].startswith(f"{steps}x{latents}x")
        assert shapes[names[0]].startswith(f"{latents}x")


def truncate(folder: Path) -> None:
    path = folder / "decoder.onnx"
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path) -> None:
    path = folder / "encoder.onnx.data"
    values = bytearray(path.read_bytes())
    values[1000] ^= 1
    path.write_bytes(values)


def leave_out(name: str, folder: Path) -> None:
    edit(folder, lambda values: values.pop(name))


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated file": (truncate, r"decoder\.onnx is damaged: sha256"),
    "flipped byte": (flip, r"encoder\.onnx\.data is damaged: sha256"),
    "missing stage": (lambda folder: (folder / "encoder.onnx").unlink(), r"encoder\.onnx is missing"),
    "no manifest": (lambda folder: (folder / FILE).unlink(), r"no package \(no manifest\.json\)"),
    "broken manifest": (lambda folder: (folder / FILE).write_text('{"schema":'), r"is damaged"),
    "other schema": (
        lambda folder: edit(folder, lambda values: values.update(schema=99)),
        r"has schema 99, .* reads 4",
    ),
    "unknown format": (lambda folder: edit(folder, lambda values: values.update(format="zip")), r"format 'zip'"),
    "unknown option": (lambda folder: edit(folder, lambda v: v["config"].update(speed=9)), r"Config has no 'speed'"),
    "wrong option": (
        lambda folder: edit(folder, lambda v: v["config"].update(key_steps=0)),
        r"malformed \(key_steps=0",
    ),
    "entry left out": (lambda folder: edit(folder, lambda values: values.pop("stages")), r"is malformed"),
    **{
        f"{name} left out": (functools.partial(leave_out, name), rf"is malformed \({name}: Field required")
        for name in ("state", "sides", "description")
    },
    "digest left out": (lambda folder: edit(folder, lambda values: values["unet"].pop("weights")), "lack weights"),
    "file elsewhere": (lambda folder: edit(folder, lambda v: v["files"].update({"../x": ""})), r"outside"),
    "other opset": (
        lambda folder: edit(folder, lambda v: v["made_with"].update(opset="3")),
        r"package has 3, the pipe 23",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_package_is_refused_before_a_runtime_sees_it(
    fault: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, message = FAULTS[fault]
    damage(copy)
    monkeypatch.setattr("fdcompile.backends.onnx.Onnx.open", lambda *arguments: pytest.fail("it was opened"))
    pipe = flat_pipe()
    before = set(vars(pipe.unet)), set(vars(pipe.scheduler))
    with pytest.raises(PackageError, match=message):
        fdcompile.load(pipe, copy)
    assert (set(vars(pipe.unet)), set(vars(pipe.scheduler))) == before


def test_a_configuration_of_before_options_were_added_has_their_defaults(copy: Path) -> None:
    edit(
        copy,
        lambda values: [
            values["config"].pop(name) for name in ("forecast", "max_parallel_steps", "memory_budget", "backend")
        ],
    )
    assert sample(fdcompile.load(flat_pipe(), copy)).isfinite().all()


def test_constants_of_a_graph_are_in_the_files_that_hold_the_weights(copy: Path) -> None:
    edit(copy, lambda values: values["stages"]["decoder"]["weights"][0].update(path=None))
    assert torch.isfinite(sample(fdcompile.load(flat_pipe(), copy))).all()


class Remembering(AttnProcessor2_0):
    """An attention processor that keeps something from one call to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("optimized", [False, True])
def test_a_unet_that_keeps_values_is_refused_and_left_as_it_was(optimized: bool, tmp_path: Path) -> None:
    pipe = flat_pipe()
    processor = Remembering()
    pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.set_processor(processor)
    if optimized:
        fdcompile.optimize(pipe)
    with pytest.raises(CaptureError, match=r"could not be exported: .* keep values from one call to the next"):
        fdcompile.export(pipe, tmp_path / "package", format="onnx", arguments=TEXTS)
    assert processor.calls == 0
    assert list(tmp_path.iterdir()) == []


def test_other_weights_configurations_and_modules_are_refused(onnx: Path) -> None:
    pipe = flat_pipe()
    pipe.unet.conv_in.weight.data[0, 0, 0, 0] += 1
    with pytest.raises(PackageError, match=r"weights: the package has [0-9a-f]{24}, the pipe [0-9a-f]{24}"):
        fdcompile.load(pipe, onnx)
    pipe = flat_pipe()
    pipe.unet.register_to_config(norm_eps=0.5)
    with pytest.raises(PackageError, match="configuration: the package has"):
        fdcompile.load(pipe, onnx)
    pipe = flat_pipe()
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(PackageError, match="modules: the package has"):
        fdcompile.load(pipe, onnx)


def test_another_call_than_exported_is_refused_naming_both_sides(onnx: Path) -> None:
    pipe = fdcompile.load(flat_pipe(), onnx)
    with pytest.raises(PackageError, match=r"another call: 40x8 pixels \(height x width\): it takes 8x8"):
        sample(pipe, height=40, width=8)
    with pytest.raises(
        PackageError, match=r"hidden_states: the package has float32\[B, 7, 32\] on cpu, the pipe .*B, 6"
    ):
        sample(pipe, prompt_embeds=torch.zeros(1, 6, 32), negative_prompt_embeds=torch.zeros(1, 6, 32))
    with pytest.raises(
        PackageError,
        match=r"batch: the package has 1 to 6 latents \(6 images without guidance, 3 with\), the pipe 8 .*4 with",
    ):
        sample(pipe, batch=4)
    assert torch.isfinite(sample(pipe)).all(), "the pipe still works"


def test_weights_changed_since_load_are_refused_where_the_package_holds_them(onnx: Path) -> None:
    pipe = fdcompile.load(flat_pipe(), onnx)
    sample(pipe)
    with torch.no_grad():
        pipe.unet.up_blocks[0].resnets[0].conv1.weight.data.mul_(2)  # as PEFT does: no version counter tells
    with pytest.raises(PackageError, match=r"weights have changed since the package was loaded"):
        sample(pipe)
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(PackageError, match=r"modules have changed since they were exported"):
        sample(pipe)


def test_weights_that_only_move_are_accepted(onnx: Path) -> None:
    """As offloading moves them."""
    pipe = fdcompile.load(flat_pipe(), onnx)
    expected = sample(pipe)
    for parameter in pipe.unet.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(sample(pipe), expected)
    pipe.unet.conv_in.weight.data *= 1.001
    with pytest.raises(PackageError, match=r"weights have changed"):
        sample(pipe)


def test_optimizing_a_loaded_pipe_compiles_anew(onnx: Path) -> None:
    pipe = fdcompile.load(flat_pipe(), onnx)
    fdcompile.optimize(pipe, Config(key_steps="all"))
    torch.testing.assert_close(
        sample(pipe, height=8, width=16), sample(flat_pipe(), height=8, width=16), rtol=0, atol=1e-3
    )


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fdcompile.backends.onnx.Onnx.write", write)
    pipe = flat_pipe()
    before = set(vars(pipe.unet))
    with pytest.raises(OSError, match="No space left"):
        fdcompile.export(pipe, tmp_path / "package", format="onnx", arguments=TEXTS)
    assert list(tmp_path.iterdir()) == []
    assert set(vars(pipe.unet)) == before


@pytest.mark.tables
def test_a_killed_export_leaves_nothing_that_loads(tmp_path: Path) -> None:
    script = (
        "import os, signal, fdcompile\n"
        "from models import TEXTS, flat_pipe\n"
        "from fdcompile.backends.onnx import Onnx\n"
        "die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Onnx.write = lambda self, stages, folder, progress: ((folder / 'x').touch(), die())\n"
        f"fdcompile.export(flat_pipe(), {str(tmp_path / 'package')!r}, format='onnx', arguments=TEXTS)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parents[1])])}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == -9
    assert not (tmp_path / "package").exists()
    (partial,) = tmp_path.iterdir()
    with pytest.raises(PackageError, match="no package"):
        fdcompile.load(flat_pipe(), partial)


def test_the_directory_is_taken_before_the_unet_is_captured(tmp_path: Path) -> None:
    taken = []

    def interrupt(what: str) -> None:
        taken.extend(path.name.partition("partial-")[2].partition("-")[0] for path in tmp_path.iterdir())
        assert what == "capturing the UNet"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fdcompile.export(flat_pipe(), tmp_path / "package", format="onnx", progress=interrupt)
    assert taken == [str(os.getpid())]
    assert not list(tmp_path.iterdir())
