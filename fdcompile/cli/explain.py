"""``fdcompile explain``."""

from __future__ import annotations

from typing import Annotated

import typer

import fdcompile
from fdcompile.cli.options import BackendName, Guidance, KeySteps, Model, ParallelSteps, Prompts, Recompute, Seed, Steps


def explain(
    model: Model = None,
    prompts: Prompts = None,
    steps: Steps = 50,
    guidance: Guidance = None,
    seed: Seed = 0,
    key_steps: KeySteps = None,
    recompute: Recompute = "encoder-propagation",
    max_parallel_steps: ParallelSteps = None,
    backend: BackendName = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print the staged program too: stages, what they take, what was hoisted.")
    ] = False,
    roofline: Annotated[
        str | None,
        typer.Option(help="Add the least time on a card by arithmetic: h100, h200, a100, l4 or rtx4090."),
    ] = None,
) -> None:
    """Print what one optimised run did."""
    from fdcompile.cli.sampling import ask, headline, prepare, sample
    from fdcompile.graph.roofline import CARDS
    from fdcompile.runtime.roofline import roofline_report

    if roofline is not None and roofline not in CARDS:
        raise typer.BadParameter(f"{roofline}: expected one of {', '.join(CARDS)}", param_hint="--roofline")
    sampling = ask(model, prompts, steps, guidance, seed)
    options = {"key_steps": key_steps, "max_parallel_steps": max_parallel_steps, "backend": backend}
    pipe, config = prepare(model, sampling, recompute, **options)
    sample(fdcompile.optimize(pipe, config), sampling)
    report = fdcompile.explain(pipe)
    programs = report.programs if verbose else ()
    parts: list[object] = [headline(pipe, config, sampling), report]
    if roofline is not None:
        parts.append(roofline_report(report, roofline))
    print(*programs, *parts, sep="\n\n")
