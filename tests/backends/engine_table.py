"""docs/tensorrt_rtx.md: engines of TensorRT for RTX, built here for models in their real architecture.

    make engines                    all of them
    make engines ENGINES='"MODEL"'  one of them anew

Each model is built in a process of its own, so that its peak memory is known.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import control
import others
import torch

from benchmarks.models import SD15, SDXL, narrow, random_pipe, random_prompts, random_unet
from fdcompile import Config, load_miniature
from fdcompile.backends.compare import largest_error
from fdcompile.backends.engine_build import build_engine
from fdcompile.backends.engine_log import LOGGER
from fdcompile.backends.onnx import Session, write_onnx
from fdcompile.backends.stored import StageExport
from fdcompile.capture.export import capture_widest
from fdcompile.graph.ranges import Range
from fdcompile.package.sizes import any_size
from fdcompile.package.stages import stage_exports
from fdcompile.passes import run_passes
from fdcompile.pipeline.record import record_call

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tensorrt_rtx.md"
RESULTS = ROOT / "benchmarks" / "results" / "engines.json"

INTRO = """# TensorRT for RTX: engines that were built

Made by `make engines` on a machine without a GPU and without a driver ({machine}), by TensorRT for RTX {version} in
float16, for all compute capabilities from 8.0 on in one engine; 1 to 6 latents and 1 to 16 steps in one engine, or 1 to
1000 of a schedule. *Narrow* has the levels, blocks and layers of the real model with 32 channels, and one transformer
layer where SDXL has several; *small* two levels. Seconds are the processor's. *Error* is the largest difference between
onnxruntime running the very graph that was parsed and torch running the stage, over the largest value, at the smallest
size; Stable Diffusion XL at its real width was not compared, because onnxruntime needs more memory for it than there
was. *Layers* are those of the parsed network; *warnings* all that the parser and the builder said; *at the peak* is
the memory of the whole process: the model, its capture and export, the comparison and the builder.

What it shows: every operation of every stage is parsed and built, with its names, types and ranges of sizes, and the
graphs that the engines are built from compute what the stages do, where an error is given. What it does not: no engine
has been executed, so their numbers, speed and memory have not been seen. Only RTX cards (compute capabilities 7.5, 8.0,
8.6, 8.9, 12.0 and 12.1) are in its support matrix, no Hopper.
"""

COLUMNS = (
    "model: stage",
    "ONNX, s",
    "compare, s",
    "error",
    "parse, s",
    "build, s",
    "engine, MiB",
    "layers",
    "warnings",
)


@dataclass(frozen=True)
class Model:
    """A pipeline, how to call it, and from where to where its height and width go in pixels; None: as it is.

    `compare`: whether memory suffices for onnxruntime, which keeps float16 weights in float32, too.
    """

    build: Callable[[], Any]
    arguments: Callable[[Any], dict[str, Any] | None]
    sides: Range | None = None
    compare: bool = True


def _random(config: dict[str, Any]) -> Callable[[], Any]:
    return lambda: random_pipe(random_unet(config))


def _prompts(pipe: Any) -> dict[str, Any]:
    return dict(random_prompts(pipe.unet, batch=1))


def _zoo(case: Any) -> Model:
    def arguments(pipe: Any) -> dict[str, Any]:
        values: dict[str, Any] = case.arguments()
        return {
            name: value.half() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in values.items()
        }

    return Model(case.build, arguments)


MODELS = {
    "The miniature": Model(load_miniature, lambda pipe: None),
    "Stable Diffusion 1.5, 512 x 512": Model(_random(dict(SD15)), _prompts),
    "Stable Diffusion 1.5, narrow, 256 to 768 pixels": Model(
        _random(narrow(SD15) | {"sample_size": 64}), _prompts, Range(256, 512, 768)
    ),
    "Stable Diffusion XL, 1024 x 1024": Model(_random(dict(SDXL)), _prompts, compare=False),
    "Stable Diffusion XL, narrow, 512 to 1536 pixels": Model(
        _random(narrow(SDXL) | {"sample_size": 128}), _prompts, Range(512, 1024, 1536)
    ),
    "ControlNet, small": _zoo(control.CASES["ControlNet"]),
    "DeepFloyd IF, stage 1, small": _zoo(others.CASES["DeepFloyd IF, stage 1"]),
}


class Timed:
    """The module `tensorrt_rtx` with its parser and builder timed, and the layers of the last network counted."""

    def __init__(self) -> None:
        import tensorrt_rtx

        self._trt = tensorrt_rtx
        self.recorded: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trt, name)

    def OnnxParser(self, network: Any, log: Any) -> Any:
        parser = self._trt.OnnxParser(network, log)
        return _Timed(parser, "parse_from_file", lambda seconds: self.recorded.update(parse=seconds))

    def Builder(self, log: Any) -> Any:
        builder = _Timed(self._trt.Builder(log), "build_serialized_network", lambda s: self.recorded.update(build=s))
        create = builder.create_network
        builder.create_network = lambda flags: self.recorded.setdefault("network", create(flags))
        return builder


class _Timed:
    def __init__(self, timed: Any, method: str, tell: Callable[[float], None]) -> None:
        self._timed, self._method, self._tell = timed, method, tell

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._timed, name)
        if name != self._method:
            return attribute

        def call(*arguments: Any) -> Any:
            began = time.process_time()
            result = attribute(*arguments)
            self._tell(time.process_time() - began)
            return result

        return call


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def stages_of(model: Model) -> list[StageExport]:
    torch.set_default_dtype(torch.float16)  # large ones are made in it
    pipe = model.build()
    torch.set_default_dtype(torch.float32)
    pipe.to(torch.float16)
    pipe.set_progress_bar_config(disable=True)
    arguments = model.arguments(pipe)
    usual = () if model.sides is None else (model.sides.opt, model.sides.opt)
    call = record_call(pipe, *(usual or (None, None)), arguments)
    sizes = any_size(pipe, call, model.sides, model.sides, arguments)
    _, captured = capture_widest(pipe.unet, call, sizes=sizes)
    program = run_passes(captured, Config.paper().recompute)
    return stage_exports(program, Range(1, 2, 6), Range(1, 3, 16), None if sizes is None else sizes.sides)


def measure(stage: StageExport, trt: Timed, compare: bool) -> dict[str, Any]:
    """Writes, compares if asked to, parses and builds it."""
    LOGGER.addHandler(warnings := _Warnings())
    LOGGER.propagate = False
    trt.recorded.clear()
    clock = [time.process_time()]
    with tempfile.TemporaryDirectory() as scratch:
        write_onnx(stage, path := Path(scratch) / f"{stage.name}.onnx")
        clock.append(time.process_time())
        if compare:
            error, _ = largest_error(stage, Session(path, stage.packaged, torch.device("cpu")), which=0)
        clock.append(time.process_time())
        engine = build_engine(trt, stage, path, lambda network, config: None)
    LOGGER.removeHandler(warnings)
    return {
        "write": clock[1] - clock[0],
        "compare": clock[2] - clock[1] if compare else None,
        "error": error if compare else None,
        "parse": trt.recorded["parse"],
        "build": trt.recorded["build"],
        "layers": trt.recorded["network"].num_layers,
        "bytes": len(engine),
        "warnings": warnings.lines,
    }


def run(name: str) -> None:
    """Prints what is measured of one model as JSON, a line a stage, and its peak memory last."""
    trt = Timed()
    for stage in stages_of(MODELS[name]):
        print(json.dumps([stage.name, measure(stage, trt, MODELS[name].compare)]), flush=True)
    print(json.dumps(["peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10]))


def page(results: dict[str, dict[str, Any]]) -> str:
    import tensorrt_rtx

    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    lines = [INTRO.format(machine=machine, version=tensorrt_rtx.__version__)]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    for name, figures in results.items():
        stages = {stage: values for stage, values in figures.items() if stage != "peak"}
        for stage, values in stages.items():
            seconds = {what: f"{values[what]:.1f}" for what in ("write", "parse", "build")}
            compared = ["", ""] if values["error"] is None else [f"{values['compare']:.1f}", f"{values['error']:.1e}"]
            numbers = [seconds["parse"], seconds["build"], f"{values['bytes'] / 2**20:.1f}"]
            cells = [seconds["write"], *compared, *numbers, str(values["layers"]), _spell(values["warnings"])]
            lines.append(f"| {name}: {stage} | {' | '.join(cells)} |")
        built, total = (sum(values[what] for values in stages.values()) for what in ("build", "bytes"))
        lines.append(
            f"| **{name}: all** | | | | | **{built:.1f}** | **{total / 2**20:.1f}** | | "
            f"{figures['peak'] / 2**30:.1f} GiB at the peak |"
        )
    return "\n".join(lines) + "\n"


def _spell(warnings: list[str]) -> str:
    return "; ".join(line.partition(": ")[2] or line for line in dict.fromkeys(warnings))


def main(names: list[str]) -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for name in names or MODELS:
        print(name, flush=True)
        command = [sys.executable, "-W", "ignore", __file__, "--measure", name]
        lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        results[name] = dict(map(json.loads, lines))
        results = {model: results[model] for model in MODELS if model in results}
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        run(sys.argv[2])
    else:
        main(sys.argv[1:])
