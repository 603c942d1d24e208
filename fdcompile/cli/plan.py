"""``fdcompile plan``."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Annotated

import typer

import fdcompile
from fdcompile.cli.calls import PromptsFile, Scheduler, asked_calls, check_drawable, load_with, progress_bar
from fdcompile.cli.errors import blame_user
from fdcompile.cli.options import MOST_STEPS, Guidance, Model, ReportFile, Steps, integer

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
        typer.Option(parser=integer(1, MOST_STEPS), metavar="N", help="Compare with stock runs of so many steps, too."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=_check_plot, help="Picture to draw: work against PSNR.")
    ] = None,
    report: ReportFile = None,
) -> None:
    """Measure where to recompute and how to forecast between, and write it down."""
    from fdcompile.cli.pages import say_how
    from fdcompile.measure.report import Page
    from fdcompile.miniature.scenes import planning_scenes
    from fdcompile.planning.plot import draw

    if report is not None:
        check_drawable()
    captions = [scene.caption for scene in planning_scenes(MINIATURE_PROMPTS)]
    calls, common = asked_calls(model, prompts, captions, steps, guidance)
    pipe = load_with(model, scheduler)
    with blame_user(TypeError, ValueError, fdcompile.CaptureError), progress_bar() as progress:
        found = fdcompile.plan(pipe, calls, converged=converged, progress=progress, **common)
    found.save(output)
    if plot is not None:
        found.plot(plot)
    print(f"{found}\n\n{output}: give fdcompile.optimize one of its configs, or a command --plan {output}")
    if report is not None:
        page = Page("Plan", f"{type(pipe).__name__}, {steps} steps. {found.verdict()}")
        plotted = BytesIO()
        draw(found, plotted)
        page.plot("Work against fidelity", plotted.getvalue(), "Share of stock's FLOPs against PSNR to stock, as below")
        names, *rows = found.rows()
        note = "Work is a share of stock's FLOPs; fewer steps: how many the same work buys, and their PSNR in dB."
        page.table("Points", names, rows, note)
        say_how(page, pipe)
        page.save(report)
        print(f"All of it on one page: {report}")
