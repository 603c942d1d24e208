"""``fdcompile generate``."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from fdcompile.cli.jobs import check_folder, check_given, pictures_bar, processes
from fdcompile.cli.options import (
    PLANNED_WORK,
    BackendName,
    Guidance,
    KeySteps,
    Model,
    ParallelSteps,
    PlanFile,
    Recompute,
    Seed,
    Side,
    Steps,
    Work,
    integer,
)

if TYPE_CHECKING:
    from rich.table import Table

    from fdcompile.config import Config
    from fdcompile.tools.generate.job import Make, Tally
    from fdcompile.tools.generate.prompts import Prompt

_FAILED = 1
_STDIN = "-"
_SPOOL = "prompts.txt"


def _check_prompts(path: str) -> str:
    if path != _STDIN and not Path(path).is_file():
        raise typer.BadParameter(f"{path!r}: there is no such file")
    return path


def generate(
    prompts: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            callback=_check_prompts,
            help="One prompt a line; in a .jsonl file an object with prompt, perhaps seed; - is what is piped in.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(metavar="DIR", callback=check_folder, help="For the pictures; those it has are not made again."),
    ],
    model: Model = None,
    batch: Annotated[int, typer.Option(parser=integer(1), metavar="N", help="Pictures at once in each process.")] = 1,
    steps: Steps = 50,
    guidance: Guidance = None,
    height: Side = None,
    width: Side = None,
    seed: Seed = 0,
    key_steps: KeySteps = None,
    recompute: Recompute = "encoder-propagation",
    plan: PlanFile = None,
    work: Work = PLANNED_WORK,
    package: Annotated[
        Path | None,
        typer.Option(metavar="DIR", callback=check_given, help="Run what fdcompile export has written."),
    ] = None,
    max_parallel_steps: ParallelSteps = None,
    backend: BackendName = None,
) -> int:
    """Make a picture of each line of a file, here or, under torchrun, on many devices."""
    from rich.console import Console

    import fdcompile
    from fdcompile.cli.errors import UserError, blame_user
    from fdcompile.cli.loading import check_plan_alone, check_takes_prompt, choose_config, load_pipe, tell
    from fdcompile.cli.sampling import MINIATURE_GUIDANCE
    from fdcompile.package.manifest import FILE, file_digest
    from fdcompile.tools.generate.job import run
    from fdcompile.tools.generate.prompts import read_prompts
    from fdcompile.tools.generate.store import Ledger

    check_plan_alone(plan, key_steps)
    ranks = processes()
    ledger = Ledger(output, ranks.process_index)
    guidance = MINIATURE_GUIDANCE if guidance is None and model is None else guidance
    pipe = load_pipe(model, device=ranks.device)
    check_takes_prompt(pipe)
    size = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    with blame_user(TypeError, ValueError, OSError, ImportError):
        options = {"key_steps": key_steps, "max_parallel_steps": max_parallel_steps, "backend": backend}
        config = choose_config(pipe, recompute, plan, work, steps, **options)
        if package is None:
            fdcompile.optimize(pipe, config)
        else:
            fdcompile.load(pipe, package, None if plan is None and key_steps is None else config)
        job = {
            "model": model or "the miniature",
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            **size,
            "config": _described(pipe, config, package),
            "plan": None if plan is None else file_digest(plan)[:12],
            "package": None if package is None else file_digest(package / FILE)[:12],
        }
        if ranks.is_main_process:
            ledger.begin(job)
        ranks.wait_for_everyone()
        ledger.check(job)
    about = {"config": hashlib.sha256(json.dumps(job["config"]).encode()).hexdigest()[:12], "plan": job["plan"]}
    arguments = {"num_inference_steps": steps, **size} | ({} if guidance is None else {"guidance_scale": guidance})
    with _opened(prompts, output, ranks) as file, pictures_bar(ranks.is_main_process) as progress:
        lines = read_prompts(file, seed, as_json=prompts.endswith(".jsonl"))
        try:
            tally = run(_maker(pipe, arguments), lines, ledger, ranks, batch, about, tell, progress)
        except (OSError, RuntimeError) as error:
            raise UserError(f"stopped: {error}; what is in {output} is whole, and the same command goes on") from error
    if ranks.is_main_process:
        Console().print(_table(tally))
        print(f"{sum(tally.pictures.values())} pictures made, {tally.skipped} there before: {output}")
    ranks.destroy_process_group()
    return _FAILED if tally.bad or tally.failed else 0


def _maker(pipe: Any, arguments: dict[str, Any]) -> Make:
    import torch

    pipe.set_progress_bar_config(disable=True)

    def make(prompts: list[Prompt]) -> Any:
        generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
        output = pipe([prompt.text for prompt in prompts], generator=generators, **arguments)
        if not hasattr(output, "images"):
            raise TypeError(f"{type(pipe).__name__} makes no pictures")
        return output.images

    return make


def _described(pipe: Any, config: Config, package: Path | None) -> dict[str, Any]:
    """The configuration that is in force."""
    from fdcompile.pipeline.session import find_session

    session = find_session(pipe) if package is not None else None
    return (config if session is None else session.config).to_dict()


@contextmanager
def _opened(prompts: str, output: Path, ranks: Any) -> Iterator[BinaryIO]:
    """The prompts' file. What is piped in can be read once: for several processes it goes to a file first."""
    if prompts == _STDIN and ranks.num_processes == 1:
        yield sys.stdin.buffer
        return
    path = Path(prompts)
    if prompts == _STDIN:
        path = output / _SPOOL
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        if ranks.is_main_process and not restarted:
            with path.open("wb") as spool:
                shutil.copyfileobj(sys.stdin.buffer, spool)
        ranks.wait_for_everyone()
    with path.open("rb") as file:
        yield file


def _table(tally: Tally) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_edge=False, show_footer=True)
    pictures, failed = sum(tally.pictures.values()), sum(tally.failed.values())
    rate = f"{pictures / tally.wall:.2f}" if tally.wall else ""
    for name, total in (("process", "all"), ("pictures", pictures), ("failed", failed), ("pictures a second", rate)):
        table.add_column(name, str(total), justify="left" if name == "process" else "right")
    for manifest in sorted(tally.pictures.keys() | tally.failed.keys()):
        seconds = tally.seconds[manifest]
        own = f"{tally.pictures[manifest] / seconds:.2f}" if seconds else ""
        rank = str(int(manifest.removeprefix("manifest-").removesuffix(".jsonl")))
        table.add_row(rank, str(tally.pictures[manifest]), str(tally.failed[manifest]), own)
    return table
