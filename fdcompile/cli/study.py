"""``fdcompile study``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fdcompile
from fdcompile.cli.errors import blame_user
from fdcompile.cli.options import (
    Guidance,
    ModelOptions,
    PlottedReportFile,
    PromptsFile,
    Steps,
    check_drawable,
    grouped,
    output_folder,
)

MINIATURE_PROMPTS = 16
"""Default number of evaluation captions for the miniature."""

FILE = "study.json"

_PLOTS = {
    "Change between steps": "Mean squared and relative change of each block's features against the step, as below",
    "Norms of features": "Boxplots of each block's Frobenius norms over the steps, and their standard deviations",
    "Principal components": "Each block's features at eight steps, their first three principal components as colors",
}


def _check_output(folder: Path) -> Path:
    check_drawable()
    if not folder.absolute().parent.is_dir():
        raise typer.BadParameter(f"{str(folder)!r}: there is no folder {str(folder.parent)!r}")
    return output_folder(folder)


@grouped
def study(
    loading: ModelOptions,
    *,
    output: Annotated[
        Path, typer.Option(metavar="DIR", callback=_check_output, help="Folder for study.json and the plots.")
    ],
    prompts: PromptsFile = None,
    steps: Steps = 50,
    guidance: Guidance = None,
    report: PlottedReportFile = None,
) -> None:
    """Measure how the features of each block change from step to step, and draw it."""
    from fdcompile.cli.loading import load_pipe
    from fdcompile.cli.progress import progress_bar
    from fdcompile.cli.report import describe, save
    from fdcompile.cli.sampling import asked_prompts, call_arguments, suited_guidance
    from fdcompile.measure.report import HtmlReport
    from fdcompile.miniature.scenes import evaluation_scenes

    captions = [scene.caption for scene in evaluation_scenes(MINIATURE_PROMPTS)]
    calls = asked_prompts(loading, prompts, captions)
    common = call_arguments(steps, suited_guidance(loading, guidance))
    pipe = load_pipe(loading)
    pipe.set_progress_bar_config(disable=True)
    with blame_user(TypeError, ValueError), progress_bar() as progress:
        result = fdcompile.study(pipe, calls, progress=progress, **common)
    print(f"{result}\n", flush=True)
    with blame_user(OSError):
        output.mkdir(exist_ok=True)
        result.save(output / FILE)
        images = result.draw(output)
    print(", ".join(map(str, (output / FILE, *images))))
    if report is not None:
        title = f"Features: {describe(pipe, steps, common.get('guidance_scale'))}, {len(calls)} prompts"
        page = HtmlReport(title, result.finding())
        note = "E_16 is the block of the encoder that takes features of 16x16; B is the bottleneck, D the decoder."
        for plot, (heading, alt) in zip(result.plots().values(), _PLOTS.items(), strict=True):
            page.plot(heading, plot, alt, note)
            note = ""
        for heading, (names, *rows) in zip(("Blocks", "Parts"), result.tables(), strict=True):
            page.table(heading, names, rows)
        save(page, pipe, report)
