"""``fdcompile demo``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fdcompile.cli.options import (
    PLANNED_WORK,
    ModelOptions,
    ReportFile,
    RunOptions,
    SamplingOptions,
    grouped,
    output_file,
)


def _check_image(path: Path) -> Path:
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise typer.BadParameter(f"{str(path)!r}: expected the name of an image file such as demo.png")
    output_file()(path)
    return path


@grouped
def demo(
    loading: ModelOptions,
    asking: SamplingOptions,
    running: RunOptions,
    *,
    output: Annotated[Path, typer.Option(metavar="FILE", callback=_check_image, help="Image to write.")] = Path(
        "demo.png"
    ),
    report: ReportFile = None,
) -> None:
    """Make the same images stock, with fewer steps at the same work, and optimized, and compare them."""
    from rich.console import Console

    from fdcompile.cli.configuration import prepare, read_plan
    from fdcompile.cli.sampling import ask, headline

    sampling = ask(loading, asking)
    plan, work = running.plan, running.work or PLANNED_WORK
    running = replace(running, plan=None, work=None if plan else running.work)
    pipe, config = prepare(loading, sampling, running)
    from fdcompile.cli.comparison import cells, compare, finding_of, show, table  # heavy
    from fdcompile.cli.report import describe, save
    from fdcompile.cli.sheet import sheet
    from fdcompile.config import Config
    from fdcompile.measure.report import HtmlReport
    from fdcompile.measure.variant import Variant
    from fdcompile.miniature import scenes_of
    from fdcompile.tools.generate.store import save_image

    variants = []
    default = Config(max_parallel_steps=config.max_parallel_steps, backend=config.backend, work=config.work)
    if plan is None and config == default:
        variants.append(Variant("paper's keys", Config.paper(backend=config.backend)))
    if plan is None and config.key_steps == "auto":
        variants.append(Variant("stock").baseline(max(1, round(config.work * sampling.steps))))
    variants.append(Variant("default" if config == default else "optimized", config))
    if plan is not None:
        stored_plan, point = read_plan(plan, pipe, work, sampling.steps, sampling.guidance, strict=running.strict)
        planned = stored_plan.configured(point)
        planned = replace(planned, max_parallel_steps=config.max_parallel_steps, backend=config.backend)
        variants.append(Variant("planned", planned))
        if (baseline := stored_plan.baseline(point)) is not None:
            variants.append(Variant("stock").baseline(baseline.steps))
    head = headline(pipe, config, sampling)
    print(head, flush=True)
    runs = compare(pipe, variants, sampling)
    rows = cells(runs, scenes_of(pipe, sampling.prompts))
    Console().print(table(runs, rows))
    save_image(sheet(runs, sampling.prompts), output)
    print(f"{', '.join(run.variant.name for run in runs)}: {output}")
    if report is not None:
        page = HtmlReport(f"Demo: {describe(pipe, sampling.steps, sampling.guidance)}", finding_of(runs))
        show(page, runs, rows, sampling.prompts)
        page.text("Run", *head.splitlines())
        save(page, pipe, report)
