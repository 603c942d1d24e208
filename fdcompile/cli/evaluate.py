"""``fdcompile evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fdcompile.cli.options import (
    PLANNED_WORK,
    Batch,
    Guidance,
    ModelOptions,
    PlottedReportFile,
    Seed,
    Side,
    Steps,
    Work,
    grouped,
    integer,
    output_folder,
)

if TYPE_CHECKING:
    from fdcompile.measure.report import HtmlReport
    from fdcompile.measure.variant import Variant
    from fdcompile.tools.evaluate.captions import Caption
    from fdcompile.tools.evaluate.table import Evaluation

MINIATURE_IMAGES = 96
"""Default number of evaluation captions for the miniature."""

_WIDEST = 250
"""Largest width of a table in characters; tables are not cut to the width of the terminal."""

_SHOWN = 8
"""Number of captions in the report's gallery."""

_VARIANTS = ("paper", "noise-injection", "deep-feature-caching")

_NOTES = {
    "Cost": "GFLOP are the UNet's. Seconds are medians of calls, each made right after a stock one.",
    "Quality": "PSNR and SSIM are medians to the stock images of the same noise. The checker is the miniature's "
    "own classifier: a Fréchet distance of its features is no FID.",
}

_FILE = {"exists": True, "dir_okay": False}
_FOLDER = {"exists": True, "file_okay": False}


@grouped
def evaluate(
    loading: ModelOptions,
    *,
    output: Annotated[
        Path,
        typer.Option(
            metavar="DIR", callback=output_folder, help="Folder for images and results; existing ones are reused."
        ),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", **_FILE, help="One prompt per line, JSON lines (.jsonl), or COCO captions (.json)."
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option(parser=integer(2), metavar="N", help="Number of prompts to use (default: all).")
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VARIANT",
            help="A name such as paper or deep-feature-caching, a number of steps of the stock pipeline, a plan or a "
            "configuration (.json). Repeatable.",
        ),
    ] = None,
    preset: Annotated[
        Literal["table-1", "table-2", "table-3"] | None,
        typer.Option(help="Compare the rows of a table of the paper instead."),
    ] = None,
    work: Work = PLANNED_WORK,
    real: Annotated[
        Path | None, typer.Option(metavar="DIR", **_FOLDER, help="Real images for FID (default: the stock images).")
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(metavar="FILE", **_FILE, help="Inception weights for FID, TorchScript.")
    ] = None,
    clip: Annotated[Path | None, typer.Option(metavar="DIR", **_FOLDER, help="CLIP model for the CLIP score.")] = None,
    lpips: Annotated[Path | None, typer.Option(metavar="FILE", **_FILE, help="Network for LPIPS, TorchScript.")] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(metavar="DIR", **_FOLDER, help="Input images of the pipeline, by name."),
    ] = None,
    batch: Batch = 1,
    steps: Steps = 50,
    guidance: Guidance = None,
    height: Side = None,
    width: Side = None,
    seed: Seed = 0,
    report: PlottedReportFile = None,
) -> int:
    """Compare variants of a pipeline: quality, FLOPs, time, memory, next to fewer steps at the same work."""
    import fdcompile
    from fdcompile.cli.errors import UserError, blame_stop, blame_user
    from fdcompile.cli.loading import load_pipe
    from fdcompile.cli.progress import progress_bar, tell
    from fdcompile.cli.report import describe, save
    from fdcompile.cli.sampling import call_arguments, check_takes_prompt, suited_guidance
    from fdcompile.measure.quality import load_networks
    from fdcompile.measure.report import HtmlReport
    from fdcompile.tools.evaluate.images import real_images
    from fdcompile.tools.evaluate.variants import parse_variant
    from fdcompile.tools.generate.job import processes

    if compare and preset:
        raise UserError("--preset has rows of its own: leave --compare out")
    ranks = processes()
    guidance = suited_guidance(loading, guidance)
    with blame_user(TypeError, ValueError, OSError, ImportError):
        for text in compare or ():
            parse_variant(text, None, work)
        captions = _captions(loading, prompts, seed, images)
        if real is not None:
            real_images(real)
        load_networks(inception, clip, lpips, ranks.device, reads=False)  # refuses files before the model is loaded
        pipe = load_pipe(loading, ranks.device)
        check_takes_prompt(pipe)
        variants = _variants(pipe, loading, compare, preset, steps)
    files = {"inputs": inputs, "real": real, "inception": inception, "clip": clip, "lpips": lpips}
    options: dict[str, Any] = files | {"work": work, "batch": batch, "tell": tell}
    options |= call_arguments(steps, guidance, height, width)
    with (
        blame_stop(output, OSError, RuntimeError),
        blame_user(TypeError, ValueError, ImportError),
        progress_bar(ranks.is_main_process) as progress,
    ):
        evaluation = fdcompile.evaluate(pipe, variants, captions, output, progress=progress, **options)
    if evaluation is not None:
        _print(evaluation)
        print("".join(f"left out: {why}\n" for why in evaluation.missing) + f"{len(captions)} prompts: {output}")
        if report is not None:
            title = f"Evaluation: {describe(pipe, steps, guidance)}, {len(captions)} prompts"
            page = HtmlReport(title, evaluation.finding())
            _fill(page, evaluation, captions, output)
            save(page, pipe, report)
    ranks.destroy_process_group()
    return 0 if evaluation is None or all(row.images == len(captions) for row in evaluation.rows) else 1


def _captions(loading: ModelOptions, prompts: Path | None, seed: int, images: int | None) -> list[Caption]:
    from fdcompile.miniature.scenes import evaluation_scenes
    from fdcompile.tools.evaluate.captions import caption, read_captions

    if prompts is not None:
        return read_captions(prompts, seed, images)
    if loading.model is not None:
        raise ValueError("--prompts is required with --model")
    scenes = evaluation_scenes(images or MINIATURE_IMAGES)
    return [caption(number, scene.caption, seed + number) for number, scene in enumerate(scenes)]


def _variants(
    pipe: object, loading: ModelOptions, texts: list[str] | None, preset: str | None, steps: int
) -> Sequence[str | Variant]:
    from fdcompile.miniature import PLANS
    from fdcompile.tools.evaluate.variants import paper_table

    if preset is not None:
        return paper_table(preset, pipe)  # type: ignore[arg-type]
    shipped = PLANS / f"ddim-{steps}.json"
    return texts or [*_VARIANTS, *([str(shipped)] if loading == ModelOptions() and shipped.is_file() else [])]


def _print(evaluation: Evaluation) -> None:
    """Prints the tables, not cut to the width of the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    for names, *rows in evaluation.tables().values():
        table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for name, cells in zip(names, zip(*rows, strict=True), strict=True):
            table.add_column(name, min_width=max(map(len, cells)))
        for row in rows:
            table.add_row(*row)
        console = Console(width=_WIDEST)
        Console(width=console.measure(table).maximum).print(table)


def _fill(page: HtmlReport, evaluation: Evaluation, captions: list[Caption], folder: Path) -> None:
    """Adds images, plot, tables and timelines to the page."""
    for stock in [row for row in evaluation.rows if row.reference is None]:
        others = [row.variant for row in evaluation.rows if row.reference == stock.variant]
        _show(page, stock.variant, others, captions, folder)
    alt = "Share of stock's FLOPs against PSNR to stock, as in the table"
    page.plot("Work against fidelity", evaluation.plot(), alt)
    for heading, (names, *rows) in evaluation.tables().items():
        page.table(heading, names, rows, _NOTES[heading])
    if evaluation.missing:
        page.text("Left out", *evaluation.missing)
    timelines = [row.cost.timeline for row in evaluation.rows if row.cost.timeline is not None]
    page.timeline("What ran at which step", timelines)


def _show(page: HtmlReport, stock: str, others: list[str], captions: list[Caption], folder: Path) -> None:
    import numpy as np

    from fdcompile.tools.evaluate.images import StoredImages, folder_name

    stored = {name: StoredImages(folder / folder_name(name)) for name in (stock, *others)}
    captions = [caption for caption in captions[:_SHOWN] if all(images.has(caption) for images in stored.values())]
    if not captions:
        return
    first, *rest = (
        (name, np.stack([images.read(caption)[0] for caption in captions])) for name, images in stored.items()
    )
    page.compared(f"Images next to {stock}", first, rest, [caption.text for caption in captions])
