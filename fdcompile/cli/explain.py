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
) -> None:
    """Print what one optimised run did."""
    from fdcompile.cli.sampling import ask, headline, prepare, sample

    sampling = ask(model, prompts, steps, guidance, seed)
    options = {"key_steps": key_steps, "max_parallel_steps": max_parallel_steps, "backend": backend}
    pipe, config = prepare(model, sampling, recompute, **options)
    sample(fdcompile.optimize(pipe, config), sampling)
    report = fdcompile.explain(pipe)
    programs = report.programs if verbose else ()
    print(*programs, headline(pipe, config, sampling), report, sep="\n\n")
