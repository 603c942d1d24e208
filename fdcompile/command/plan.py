"""``fdcompile plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fdcompile
from fdcompile.command.calls import PromptsFile, Scheduler, asked_calls, check_drawable, load_with, progress_bar
from fdcompile.command.errors import blame_user
from fdcompile.command.options import MOST_STEPS, Guidance, Model, Steps, whole

MINIATURE_PROMPTS = 16
"""As many captions of its grammar the miniature is planned with by default."""


def _check_folder(path: Path | None) -> Path | None:
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"{str(path)!r}: there is no folder {str(path.parent)!r}")
    return path


def _check_plot(path: Path | None) -> Path | None:
    if path is not None:
        check_drawable()
    return _check_folder(path)


def plan(
    output: Annotated[Path, typer.Option(metavar="FILE", callback=_check_folder, help="Plan to write, as JSON.")],
    model: Model = None,
    prompts: PromptsFile = None,
    steps: Steps = 50,
    guidance: Guidance = None,
    scheduler: Scheduler = None,
    converged: Annotated[
        int | None,
        typer.Option(parser=whole(1, MOST_STEPS), metavar="N", help="Compare with stock runs of so many steps, too."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=_check_plot, help="Picture to draw: work against PSNR.")
    ] = None,
) -> None:
    """Measure where to recompute and how to forecast between, and write it down."""
    from fdcompile.miniature.scenes import planning_scenes

    captions = [scene.caption for scene in planning_scenes(MINIATURE_PROMPTS)]
    calls, common = asked_calls(model, prompts, captions, steps, guidance)
    pipe = load_with(model, scheduler)
    with blame_user(TypeError, ValueError, fdcompile.CaptureError), progress_bar() as progress:
        found = fdcompile.plan(pipe, calls, converged=converged, progress=progress, **common)
    found.save(output)
    if plot is not None:
        found.plot(plot)
    print(f"{found}\n\n{output}: give fdcompile.optimize one of its configs, or a command --plan {output}")
