"""``fdcompile gate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fdcompile
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
    Seed,
    Steps,
    Work,
)

if TYPE_CHECKING:
    from fdcompile.cli.sampling import Sampling

_DIFFERS = 1
_SLOWER = 1.0
"""Time as a share of stock above which there is a warning."""


def _check_file(path: Path | None) -> Path | None:
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{str(path)!r}: there is no folder {str(path.parent)!r}")
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{str(path)!r} is a folder: expected the name of a file")
    return path


def gate(
    baseline: Annotated[
        Path, typer.Option(metavar="FILE", callback=_check_file, help="Figures to compare with, as JSON.")
    ],
    update: Annotated[bool, typer.Option("--update", help="Write what is found as the new baseline.")] = False,
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
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=_check_file, help="Write the findings as JUnit XML, too.")
    ] = None,
) -> int:
    """Fail if a model's figures or fidelity got worse than those in a file: for CI."""
    from fdcompile.cli.errors import UserError, blame_user
    from fdcompile.cli.loading import check_plan_alone, choose_config, tell
    from fdcompile.cli.sampling import ask, known_scenes, prepare
    from fdcompile.tools.gate.baseline import Baseline, compare, difference_table
    from fdcompile.tools.gate.junit import write_junit
    from fdcompile.tools.gate.measure import measure

    check_plan_alone(plan, key_steps)
    sampling = ask(model, prompts, steps, guidance, seed)
    known = None
    if not update:
        if not baseline.is_file():
            raise UserError(f"there is no {baseline}: write it with --update")
        with blame_user(ValueError, OSError):
            known = Baseline.load(baseline)
    options = {"key_steps": key_steps, "max_parallel_steps": max_parallel_steps, "backend": backend}
    pipe, _ = prepare(model, sampling, recompute, **options)
    pipe.set_progress_bar_config(disable=True)
    config = choose_config(pipe, recompute, plan, work, steps, **options)
    asked = _asked(pipe, sampling)
    if known is not None:
        with blame_user(ValueError):
            known.check_asked(asked)
    tell("making the pictures stock, optimised, and with every step a key step")
    scenes = known_scenes(sampling.prompts) if model is None else None
    with blame_user(fdcompile.CaptureError):
        found = measure(pipe, config, sampling.call(), scenes)
    own = Baseline(asked, found.exact, found.fidelity)
    if known is None:
        own.save(baseline)
        print(f"{len(own.exact)} exact figures and {len(own.fidelity)} of fidelity written to {baseline}")
        return 0
    findings = compare(known, found)
    if junit is not None:
        write_junit(findings, junit)
    table = difference_table(findings)
    said = [table or f"All {len(findings)} figures are as in {baseline}.", _wall_clock(found.ratio, len(found.ratios))]
    if table:
        said.insert(1, "If this is meant, the same command with --update writes a new baseline.")
    print("\n\n".join(said))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write("\n\n".join(["### fdcompile gate", *said]) + "\n")
    return _DIFFERS if table else 0


def _asked(pipe: Any, sampling: Sampling) -> dict[str, Any]:
    """What pictures depend on besides the model's weights and the compiler."""
    return {
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "prompts": list(sampling.prompts),
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "seed": sampling.seed,
    }


def _wall_clock(ratio: float, pairs: int) -> str:
    line = f"Time of an optimised call: {ratio:.2f} of stock (median of {pairs} pairs)."
    return line if ratio <= _SLOWER else f"WARNING: slower than stock. {line}"
