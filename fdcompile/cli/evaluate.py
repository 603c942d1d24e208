"""``fdcompile evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fdcompile.cli.calls import Scheduler, check_drawable
from fdcompile.cli.jobs import check_folder, check_given, pictures_bar, processes
from fdcompile.cli.options import PLANNED_WORK, Guidance, Model, ReportFile, Seed, Side, Steps, Work, integer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdcompile.measure.report import Page
    from fdcompile.tools.evaluate.captions import Caption
    from fdcompile.tools.evaluate.evaluate import Evaluation
    from fdcompile.tools.evaluate.pictures import Asked
    from fdcompile.tools.evaluate.variants import Way

MINIATURE_PICTURES = 96
"""As many of its evaluation captions the miniature is evaluated with by default."""

_WIDEST = 250
"""Characters of a line of a table, which is not cut to what the terminal shows."""

_SHOWN = 8
"""Captions whose pictures the report shows."""

_WAYS = ("paper", "noise-injection", "deep-feature-caching")


def _check_file(path: Path | None) -> Path | None:
    if path is not None and not path.is_file():
        raise typer.BadParameter(f"{str(path)!r}: there is no such file")
    return path


def evaluate(
    output: Annotated[
        Path,
        typer.Option(metavar="DIR", callback=check_folder, help="For pictures and results; goes on with what it has."),
    ],
    model: Model = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", callback=_check_file, help="One a line, JSON lines (.jsonl), or COCO's captions (.json)."
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option(parser=integer(2), metavar="N", help="Of the first prompts (default: of all).")
    ] = None,
    way: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WAY",
            help="Repeatable: a name such as paper or deep-feature-caching, a number of steps of the stock pipeline, "
            "a plan or a configuration (.json).",
        ),
    ] = None,
    preset: Annotated[
        Literal["table-1", "table-2", "table-3"] | None, typer.Option(help="Rows of the paper's tables instead.")
    ] = None,
    work: Work = PLANNED_WORK,
    real: Annotated[
        Path | None,
        typer.Option(metavar="DIR", callback=check_given, help="Real pictures for FID (default: stock's own)."),
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=_check_file, help="Inception weights for FID, TorchScript.")
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(metavar="DIR", callback=check_given, help="CLIP model for the CLIP score.")
    ] = None,
    lpips: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=_check_file, help="Network for LPIPS, TorchScript.")
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(metavar="DIR", callback=check_given, help="Pictures that the pipeline starts from, by name."),
    ] = None,
    batch: Annotated[int, typer.Option(parser=integer(1), metavar="N", help="Prompts at once in each process.")] = 1,
    steps: Steps = 50,
    guidance: Guidance = None,
    height: Side = None,
    width: Side = None,
    seed: Seed = 0,
    scheduler: Scheduler = None,
    report: ReportFile = None,
) -> int:
    """Compare ways to make the same pictures: quality, FLOPs, time, memory, beside fewer steps at the same work."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    import fdcompile
    from fdcompile.cli.calls import load_with
    from fdcompile.cli.errors import UserError, blame_user
    from fdcompile.cli.loading import check_takes_prompt, tell
    from fdcompile.cli.pages import say_how
    from fdcompile.cli.sampling import MINIATURE_GUIDANCE
    from fdcompile.measure.quality import load_networks
    from fdcompile.measure.report import Page
    from fdcompile.tools.evaluate.evaluate import evaluate as compare
    from fdcompile.tools.evaluate.evaluate import with_references
    from fdcompile.tools.evaluate.pictures import Asked, real_pictures
    from fdcompile.tools.evaluate.variants import check_way

    if report is not None:
        check_drawable()
    if way and preset:
        raise UserError("--preset has rows of its own: leave --way out")
    guidance = MINIATURE_GUIDANCE if guidance is None and model is None else guidance
    ranks = processes()
    with blame_user(TypeError, ValueError, OSError, ImportError):
        for text in way or ():
            check_way(text)
        captions = _captions(model, prompts, seed, images)
        compared = [] if real is None else real_pictures(real)
        networks = load_networks(inception, clip, lpips, ranks.device, model is None and prompts is None)
        pipe = load_with(model, scheduler, ranks.device)
        check_takes_prompt(pipe)
        ways = with_references(_ways(pipe, model, way, preset, work, steps))
        for own in ways:
            if own.config is not None:
                fdcompile.restore(own.of(pipe))
        size = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
        arguments: dict[str, Any] = size | ({} if guidance is None else {"guidance_scale": guidance})
        asked = Asked(captions, arguments, steps, inputs, batch)
        asked.check_inputs(ways)
    job = {
        "model": model or "the miniature",
        "scheduler": scheduler,
        "inputs": None if inputs is None else str(inputs),
        **arguments,
    }
    with pictures_bar(ranks.is_main_process) as progress:
        try:
            found = compare(pipe, ways, asked, output, job, networks, compared, ranks, tell, progress)
        except (OSError, RuntimeError, ValueError, fdcompile.CaptureError) as error:
            raise UserError(f"stopped: {error}; what is in {output} is whole, and the same command goes on") from error
    if found is not None:
        for names, *rows in found.tables().values():
            table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
            for name, cells in zip(names, zip(*rows, strict=True), strict=True):
                table.add_column(name, min_width=max(map(len, cells)))
            for row in rows:
                table.add_row(*row)
            console = Console(width=_WIDEST)
            Console(width=console.measure(table).maximum).print(table)
        print("".join(f"left out: {why}\n" for why in found.missing) + f"{len(captions)} prompts: {output}")
        if report is not None:
            page = Page("Quality and cost", f"{type(pipe).__name__}, {len(captions)} prompts, guidance {guidance}")
            _fill(page, found, asked, output)
            say_how(page, pipe)
            page.save(report)
            print(f"All of it on one page: {report}")
    ranks.destroy_process_group()
    return 0 if found is None or all(row.pictures == len(captions) for row in found.rows) else 1


def _captions(model: str | None, prompts: Path | None, seed: int, images: int | None) -> list[Caption]:
    from fdcompile.miniature.scenes import evaluation_scenes
    from fdcompile.tools.evaluate.captions import caption, read_captions

    if prompts is not None:
        return read_captions(prompts, seed, images)
    if model is not None:
        raise ValueError("--prompts is missing: what the model will be asked for")
    scenes = evaluation_scenes(images or MINIATURE_PICTURES)
    return [caption(number, scene.caption, seed + number) for number, scene in enumerate(scenes)]


def _ways(pipe: Any, model: str | None, texts: Sequence[str] | None, preset: Any, work: float, steps: int) -> list[Way]:
    from fdcompile.miniature import PLANS
    from fdcompile.tools.evaluate.variants import paper_table, parse_way

    if preset is not None:
        return paper_table(preset, pipe)
    if not texts:
        shipped = PLANS / f"ddim-{steps}.json"
        texts = [*_WAYS, *([str(shipped)] if model is None and shipped.is_file() else [])]
    return [parse_way(text, pipe, work, steps) for text in texts]


def _fill(page: Page, found: Evaluation, asked: Asked, folder: Path) -> None:
    """With the table, the frontier, pictures beside stock's, and what ran when."""
    from fdcompile.tools.evaluate.draw import draw

    for heading, (names, *rows) in found.tables().items():
        page.table(heading, names, rows)
    if found.missing:
        page.text("Left out", *found.missing)
    page.plot("Work against fidelity", draw(found), "Share of stock's FLOPs against PSNR to stock, as in the table")
    for stock in [row for row in found.rows if row.reference is None]:
        _show(page, stock.way, [row.way for row in found.rows if row.reference == stock.way], asked, folder)
    page.timeline("What ran at which step", [own for row in found.rows if (own := row.cost.timeline) is not None])


def _show(page: Page, stock: str, others: Sequence[str], asked: Asked, folder: Path) -> None:
    from PIL import Image

    from fdcompile.cli.sheet import AMPLIFICATION, difference
    from fdcompile.tools.evaluate.pictures import Made, folder_name

    made = [Made(folder / folder_name(name)) for name in (stock, *others)]
    pictured = []
    for caption in asked.captions[:_SHOWN]:
        if all(own.has(caption) for own in made):
            first, *rest = [own.read(caption)[0] for own in made]
            pictures = [first, *rest, *(difference(first, other) for other in rest)]
            pictured.append((caption.text, [Image.fromarray(picture) for picture in pictures]))
    columns = [stock, *others, *(f"{name}, difference" for name in others)]
    note = f"Differences are from the stock picture, amplified {AMPLIFICATION} times."
    page.gallery(f"Pictures beside {stock}", columns, pictured, note)
