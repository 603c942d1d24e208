"""``fdcompile study``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fdcompile
from fdcompile.cli.calls import PromptsFile, Scheduler, asked_calls, check_drawable, load_with, progress_bar
from fdcompile.cli.errors import blame_user
from fdcompile.cli.options import Guidance, Model, ReportFile, Steps

MINIATURE_PROMPTS = 16
"""As many of its evaluation captions the miniature is studied with by default."""

FILE = "study.json"

_PLOTS = {
    "Change between steps": "Mean squared and relative change of each block's features against the step, as below",
    "Norms of features": "Boxplots of each block's Frobenius norms over the steps, and their standard deviations",
    "Principal components": "Each block's features at eight steps, their first three principal components as colours",
}


def _check_output(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise typer.BadParameter(f"{str(folder)!r} is a file: expected a folder")
    if not folder.absolute().parent.is_dir():
        raise typer.BadParameter(f"{str(folder)!r}: there is no folder {str(folder.parent)!r}")
    check_drawable()
    return folder


def study(
    output: Annotated[
        Path, typer.Option(metavar="DIR", callback=_check_output, help="For study.json and the pictures.")
    ],
    model: Model = None,
    prompts: PromptsFile = None,
    steps: Steps = 50,
    guidance: Guidance = None,
    scheduler: Scheduler = None,
    report: ReportFile = None,
) -> None:
    """Measure how the features of each block change from step to step, and draw it."""
    from fdcompile.cli.pages import say_how
    from fdcompile.measure.report import Page
    from fdcompile.miniature.scenes import evaluation_scenes

    captions = [scene.caption for scene in evaluation_scenes(MINIATURE_PROMPTS)]
    calls, common = asked_calls(model, prompts, captions, steps, guidance)
    pipe = load_with(model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    with blame_user(TypeError, ValueError), progress_bar() as progress:
        found = fdcompile.study(pipe, calls, progress=progress, **common)
    output.mkdir(exist_ok=True)
    found.save(output / FILE)
    pictures = found.draw(output)
    print(f"{found}\n\n{', '.join(map(str, (output / FILE, *pictures)))}")
    if report is not None:
        page = Page("What changes from step to step", f"{type(pipe).__name__}, {steps} steps, {len(calls)} prompts")
        for path, (heading, alt) in zip(pictures, _PLOTS.items(), strict=True):
            page.plot(heading, path.read_bytes(), alt)
        for heading, (names, *rows) in zip(("Blocks", "Parts"), found.tables(), strict=True):
            page.table(heading, names, rows)
        say_how(page, pipe)
        page.save(report)
        print(f"All of it on one page: {report}")
