"""``fdcompile generate``."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from fdcompile.cli.options import Batch, Guidance, ModelOptions, RunOptions, Seed, Side, Steps, grouped, output_folder

if TYPE_CHECKING:
    from rich.table import Table

    from fdcompile.tools.generate.job import Summary

_FAILED = 1
_STDIN = "-"


def _check_prompts(path: str) -> str:
    if path == _STDIN:
        return path
    if not Path(path).is_file():
        raise typer.BadParameter(f"{path!r}: there is no such file")
    with Path(path).open("rb") as lines:
        if not any(map(bytes.strip, lines)):
            raise typer.BadParameter(f"{path!r}: there are no prompts in it")
    return path


@grouped
def generate(
    loading: ModelOptions,
    running: RunOptions,
    *,
    prompts: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            callback=_check_prompts,
            help="One prompt per line; in a .jsonl file an object with prompt and optionally seed; - reads stdin.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            metavar="DIR", callback=output_folder, help="Folder for the images; existing ones are not made again."
        ),
    ],
    batch: Batch = 1,
    steps: Steps = 50,
    guidance: Guidance = None,
    height: Side = None,
    width: Side = None,
    seed: Seed = 0,
    package: Annotated[
        Path | None,
        typer.Option(metavar="DIR", exists=True, file_okay=False, help="Run a package written by fdcompile export."),
    ] = None,
) -> int:
    """Make an image for each line of a file, in one process or, under torchrun, on many devices."""
    from rich.console import Console

    import fdcompile
    from fdcompile.cli.configuration import check_choice, make_config
    from fdcompile.cli.errors import blame_stop, blame_user
    from fdcompile.cli.loading import load_pipe
    from fdcompile.cli.progress import progress_bar, tell
    from fdcompile.cli.sampling import call_arguments, check_takes_prompt, suited_guidance
    from fdcompile.package.manifest import FILE, file_digest
    from fdcompile.tools.generate.job import processes
    from fdcompile.tools.generate.prompts import read_prompts

    check_choice(running, steps)
    ranks = processes()
    pipe = load_pipe(loading, ranks.device)
    check_takes_prompt(pipe)
    with blame_user(TypeError, ValueError, OSError, ImportError):
        config = make_config(pipe, running, steps, suited_guidance(loading, guidance))
        if package is None:
            fdcompile.optimize(pipe, config)
        else:
            chosen = running.plan is not None or running.key_steps is not None
            fdcompile.load(pipe, package, config if chosen else None)
        origin = {
            "plan": None if running.plan is None else file_digest(running.plan)[:12],
            "package": None if package is None else file_digest(package / FILE)[:12],
        }
    common = call_arguments(steps, suited_guidance(loading, guidance), height, width)
    common |= {"batch": batch, "seed": seed, "origin": origin, "tell": tell}
    with _opened(prompts, output, ranks) as file, progress_bar(ranks.is_main_process) as progress:
        lines = read_prompts(file, seed, as_json=prompts.endswith(".jsonl"))
        with blame_stop(output, OSError, RuntimeError), blame_user(ValueError):
            summary = fdcompile.generate(pipe, lines, output, progress=progress, **common)
    if ranks.is_main_process:
        Console().print(_table(summary))
        print(f"{sum(summary.images.values())} images made, {summary.skipped} there before: {output}")
    ranks.destroy_process_group()
    return _FAILED if summary.bad or summary.failed else 0


@contextmanager
def _opened(prompts: str, output: Path, ranks: Any) -> Iterator[BinaryIO]:
    """Opens the prompts. Stdin can be read only once, so several processes read a copy on disk."""
    if prompts == _STDIN and ranks.num_processes == 1:
        yield sys.stdin.buffer
        return
    from fdcompile.tools.generate.store import SPOOL

    path = Path(prompts)
    if prompts == _STDIN:
        path = output / SPOOL
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        if ranks.is_main_process and not restarted:
            output.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as spool:
                shutil.copyfileobj(sys.stdin.buffer, spool)
        ranks.wait_for_everyone()
    with path.open("rb") as file:
        yield file


def _table(summary: Summary) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_edge=False, show_footer=True)
    images, failed = sum(summary.images.values()), sum(summary.failed.values()) + summary.bad
    rate = f"{images / summary.wall:.2f}" if summary.wall else ""
    for name, total in (("process", "all"), ("images", images), ("failed", failed), ("images a second", rate)):
        table.add_column(name, str(total), justify="left" if name == "process" else "right")
    for manifest in sorted(summary.images.keys() | summary.failed.keys()):
        seconds = summary.seconds[manifest]
        rank_rate = f"{summary.images[manifest] / seconds:.2f}" if seconds else ""
        rank = str(int(manifest.removeprefix("manifest-").removesuffix(".jsonl")))
        table.add_row(rank, str(summary.images[manifest]), str(summary.failed[manifest]), rank_rate)
    if summary.bad:
        table.add_row("unreadable lines", "", str(summary.bad), "")
    return table
