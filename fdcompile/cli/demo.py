"""``fdcompile demo``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fdcompile.cli.options import (
    PLANNED_WORK,
    BackendName,
    Guidance,
    KeySteps,
    Model,
    ParallelSteps,
    PlanFile,
    Prompts,
    Recompute,
    ReportFile,
    Seed,
    Steps,
    Work,
)


def _check_picture(path: Path) -> Path:
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise typer.BadParameter(f"{str(path)!r}: expected the name of a picture file such as demo.png")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{str(path)!r}: there is no folder {str(path.parent)!r}")
    return path


def demo(
    model: Model = None,
    prompts: Prompts = None,
    steps: Steps = 50,
    guidance: Guidance = None,
    seed: Seed = 0,
    key_steps: KeySteps = None,
    recompute: Recompute = "encoder-propagation",
    plan: PlanFile = None,
    work: Work = PLANNED_WORK,
    max_parallel_steps: ParallelSteps = None,
    backend: BackendName = None,
    output: Annotated[Path, typer.Option(metavar="FILE", callback=_check_picture, help="Picture to write.")] = Path(
        "demo.png"
    ),
    report: ReportFile = None,
) -> None:
    """Make the same pictures stock and optimised, and compare them; with a plan also planned and with fewer steps."""
    from rich.console import Console

    from fdcompile.cli.comparison import cells, compare, table
    from fdcompile.cli.loading import read_plan
    from fdcompile.cli.pages import say_how, show
    from fdcompile.cli.sampling import ask, headline, known_scenes, prepare
    from fdcompile.cli.sheet import sheet
    from fdcompile.measure.report import Page
    from fdcompile.miniature import PLANS
    from fdcompile.tools.evaluate.variants import Way
    from fdcompile.tools.generate.store import save_picture

    sampling = ask(model, prompts, steps, guidance, seed)
    options = {"key_steps": key_steps, "max_parallel_steps": max_parallel_steps, "backend": backend}
    pipe, config = prepare(model, sampling, recompute, **options)
    ways = [Way("optimised" if key_steps else "paper's keys", config)]
    shipped = PLANS / f"ddim-{steps}.json"
    if plan is None and model is None and shipped.is_file():
        plan = shipped
    if plan is not None:
        found, point = read_plan(plan, pipe, work, steps)
        planned = found.configured(point)
        planned = replace(planned, max_parallel_steps=config.max_parallel_steps, backend=config.backend)
        ways.append(Way("planned", planned))
        if (fewer := found.control(point)) is not None:
            ways.append(Way("stock").control(fewer.steps))
    print(headline(pipe, config, sampling), flush=True)
    runs = compare(pipe, ways, sampling)
    rows = cells(runs, known_scenes(sampling.prompts) if model is None else None)
    Console().print(table(runs, rows))
    save_picture(sheet(runs, sampling.prompts), output)
    print(f"{', '.join(run.way.name for run in runs)}: {output}")
    if report is not None:
        page = Page("Stock and optimised pictures", headline(pipe, config, sampling).replace("\n", "; "))
        show(page, runs, rows, sampling.prompts)
        say_how(page, pipe)
        page.save(report)
        print(f"All of it on one page: {report}")
