"""``fdcompile export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import fdcompile
from fdcompile.cli.errors import blame_user
from fdcompile.cli.loading import check_plan_alone, choose_config, load_pipe, tell
from fdcompile.cli.options import PLANNED_WORK, KeySteps, Model, PlanFile, Recompute, Work

Format = Literal["aot_inductor", "onnx", "tensorrt", "tensorrt_onnx", "tensorrt_rtx"]
Precision = Literal["float32", "float16", "bfloat16"]


def _range(text: str) -> Any:
    from fdcompile.graph.ranges import Range

    try:
        numbers = tuple(int(part) for part in text.split(","))
        value = numbers if len(numbers) > 1 else numbers[0]
        Range.parse("range", value)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: expected a number, or smallest,usual,largest") from error
    return value


def _check_format(name: Format) -> Format:
    from fdcompile.backends import package_format

    with blame_user(ImportError):
        package_format(name).check()
    return name


def _check_directory(directory: Path) -> Path:
    from fdcompile.package.directory import check_free

    with blame_user(OSError):
        check_free(directory)
    return directory


Side = Annotated[
    Any,
    typer.Option(parser=_range, metavar="MIN,OPT,MAX", help="Of a picture in pixels (default: the model's own)."),
]


def export(
    directory: Annotated[Path, typer.Argument(callback=_check_directory, help="To make.")],
    format: Annotated[Format, typer.Option(callback=_check_format, help="What the stages are compiled to.")],
    model: Model = None,
    key_steps: KeySteps = None,
    recompute: Recompute = "encoder-propagation",
    plan: PlanFile = None,
    work: Work = PLANNED_WORK,
    height: Side = None,
    width: Side = None,
    batch: Annotated[
        Any, typer.Option(parser=_range, metavar="MIN,OPT,MAX", help="Pictures at once; or one number.")
    ] = None,
    parallel_steps: Annotated[
        Any, typer.Option(parser=_range, metavar="MIN,OPT,MAX", help="Steps decoded at once; or one number.")
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="To load the model in (default: float16 on CUDA).")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="SM89,...", help="GPUs for tensorrt_rtx to build for (default: from sm80 on).")
    ] = None,
) -> None:
    """Write the UNet's stages to a directory that fdcompile.load runs."""
    import torch

    check_plan_alone(plan, key_steps)
    dtype = None if precision is None else getattr(torch, precision)
    pipe = load_pipe(model, dtype)
    sizes = {"height": height, "width": width, "batch": batch, "parallel_steps": parallel_steps}
    sizes["target"] = None if target is None else target.split(",")
    given: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    with blame_user(TypeError, ValueError, OSError, ImportError, fdcompile.CaptureError):
        fdcompile.optimize(pipe, choose_config(pipe, recompute, plan, work, key_steps=key_steps))
        folder = fdcompile.export(pipe, directory, format=format, precision=dtype, progress=tell, **given)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 2**20:.1f} MiB; run it with fdcompile.load(pipe, {str(folder)!r})")
