"""``fdcompile export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import fdcompile
from fdcompile.cli.errors import blame_user
from fdcompile.cli.options import KeyStepOptions, ModelOptions, grouped

Format = Literal["aot_inductor", "onnx", "tensorrt", "tensorrt_onnx", "tensorrt_rtx", "tensorrt_rtx_refit"]


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
    from fdcompile.io import check_folder, check_free

    with blame_user(OSError):
        check_free(directory)
        check_folder(directory)
    return directory


Side = Annotated[
    Any,
    typer.Option(parser=_range, metavar="MIN,OPT,MAX", help="Size in pixels (default: the model's own)."),
]


@grouped
def export(
    loading: ModelOptions,
    choosing: KeyStepOptions,
    *,
    output: Annotated[Path, typer.Option(metavar="DIR", callback=_check_directory, help="Directory to create.")],
    format: Annotated[Format, typer.Option(callback=_check_format, help="Format of the compiled stages.")],
    height: Side = None,
    width: Side = None,
    batch: Annotated[
        Any, typer.Option(parser=_range, metavar="MIN,OPT,MAX", help="Images per call; a range or one number.")
    ] = None,
    parallel_steps: Annotated[
        Any, typer.Option(parser=_range, metavar="MIN,OPT,MAX", help="Steps decoded per call; a range or one number.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="SM89,...", help="GPU architectures for tensorrt_rtx (default: sm80 and later)."),
    ] = None,
) -> None:
    """Write the UNet's stages to a directory that fdcompile.load runs."""
    import torch

    from fdcompile.cli.configuration import check_choice, make_config
    from fdcompile.cli.loading import load_pipe
    from fdcompile.cli.progress import tell

    check_choice(choosing)
    dtype = None if loading.precision is None else getattr(torch, loading.precision)
    pipe = load_pipe(loading)
    sizes: dict[str, Any] = {"height": height, "width": width, "batch": batch, "parallel_steps": parallel_steps}
    sizes["target"] = None if target is None else target.split(",")
    given: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    with blame_user(TypeError, ValueError, OSError, ImportError, fdcompile.CaptureError):
        fdcompile.optimize(pipe, make_config(pipe, choosing))
        folder = fdcompile.export(pipe, output, format=format, precision=dtype, progress=tell, **given)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 2**20:.1f} MiB; run it with fdcompile.load(pipe, {str(folder)!r})")
