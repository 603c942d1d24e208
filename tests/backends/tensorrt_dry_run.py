"""Run by a test in a process of its own, with the tests on its path: lower one model for TensorRT, print JSON."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from typing import Any

import control
import others
import stable_diffusion
import tensorrt_standin
import torch
from case import Case
from models import TEXTS, flat_pipe
from torch import nn

from benchmarks.models import SD15, SDXL, narrow, random_pipe, random_prompts, random_unet
from fdcompile import Config
from fdcompile.backends.compare import largest_error
from fdcompile.backends.stored import StageExport
from fdcompile.backends.tensorrt import SETTINGS, profile
from fdcompile.capture.export import capture_widest
from fdcompile.graph.ranges import Range, Sides
from fdcompile.package.sizes import any_size
from fdcompile.package.stages import stage_exports
from fdcompile.passes import run_passes
from fdcompile.pipeline.record import pixels_per_latent, record_call


def whole(config: Mapping[str, Any]) -> Case:
    """All blocks and layers of a model, narrow."""
    return Case(
        lambda: random_pipe(random_unet(narrow(config))), lambda: random_prompts(random_unet(narrow(config)), batch=1)
    )


WHOLE = {"Stable Diffusion 1.5, all layers": whole(SD15), "Stable Diffusion XL, all layers": whole(SDXL)}
SMALLEST = "the least UNet that has all stages"
CASES = stable_diffusion.CASES | control.CASES | others.CASES | WHOLE | {SMALLEST: Case(flat_pipe, lambda: TEXTS)}
STEPS = Range(1, 3, 16)
FORECAST = ", forecast"
SIZES = ", any size"
"""From the usual height and width to twice that."""


def dry_run(stage: StageExport, sides: Sides | None, counted: list[Any]) -> dict[str, Any]:
    import torch_tensorrt.dynamo

    settings = SETTINGS | {"require_full_compilation": False}  # so that what falls back is counted, not refused
    lowered = torch_tensorrt.dynamo.compile(stage.program, arg_inputs=profile(stage), dryrun=True, **settings)
    tracker = counted.pop()
    return {
        "operations": tracker.total_ops_in_graph,
        "unsupported": tracker.total_ops_in_graph - tracker.supported_ops_in_graph,
        "partitions": tracker.tensorrt_graph_count,
        "in torch": tracker.to_run_in_torch,
        "names": list(stage.program.graph_signature.user_inputs) == [port.name for port in stage.packaged.inputs],
        "profile": [sizes.shape for sizes in profile(stage)],
        "asked": [shape if shape[0] != shape[2] else shape[1] for shape in stage.shapes],
        "axes": [
            str(stage.packaged.latents),
            str(stage.packaged.parallel_steps or stage.packaged.sampling_steps or ""),
            "" if sides is None else f"{sides.latent_height}, {sides.latent_width}",
        ],
        "error": max(largest_error(stage, lowered, which)[0] for which in range(3)),
    }


class Unsupported(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.linalg.svdvals(x + 1),)


def stages_of(name: str) -> tuple[list[StageExport], Sides | None]:
    """Those of a case, whose sizes are ranges unless they are fixed."""
    case_name, fixed, _ = name.removesuffix(FORECAST).removesuffix(SIZES).partition(", fixed")
    pipe = CASES[case_name].build()
    arguments = CASES[case_name].arguments()
    call = record_call(pipe, None, None, arguments)
    sizes = None
    if SIZES in name:
        pixels = pixels_per_latent(pipe)
        usual = [pixels * max(side, 16) for side in call.sample.shape[-2:]]
        call = record_call(pipe, *usual, arguments)
        sizes = any_size(pipe, call, *(Range(side, side, 2 * side) for side in usual), arguments)
    _, captured = capture_widest(pipe.unet, call, sizes=sizes)
    program = run_passes(captured, Config.paper().recompute, forecast=name.endswith(FORECAST))
    batch, steps = (Range(2, 2, 2), Range(3, 3, 3)) if fixed else (Range(1, 2, 6), STEPS)
    sides = None if sizes is None else sizes.sides
    return stage_exports(program, batch, steps, sides), sides


def unsupported(counted: list[Any]) -> dict[str, int]:
    """What is counted where something cannot be lowered."""
    import torch_tensorrt.dynamo

    example = torch.randn(3, 3)
    program = torch.export.export(Unsupported(), (example,))
    settings = SETTINGS | {"require_full_compilation": False}
    torch_tensorrt.dynamo.compile(program, arg_inputs=[example], dryrun=True, **settings)
    operations: dict[str, int] = counted.pop().unsupported_ops
    return operations


def main(name: str) -> None:
    tensorrt_standin.install()
    import torch_tensorrt.dynamo

    with tensorrt_standin.lowering() as counted:
        stages, sides = stages_of(name)
        result = {
            "stages": {stage.name: dry_run(stage, sides, counted) for stage in stages},
            "unsupported": unsupported(counted),
            "arguments": list(
                inspect.signature(torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine).parameters
            ),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
