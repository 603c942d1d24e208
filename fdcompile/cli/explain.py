"""``fdcompile explain``."""

from __future__ import annotations

from typing import Annotated

import typer

import fdcompile
from fdcompile.cli.options import ModelOptions, RunOptions, SamplingOptions, grouped


@grouped
def explain(
    loading: ModelOptions,
    asking: SamplingOptions,
    running: RunOptions,
    *,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Also print the staged program: stages, inputs, hoisted values.")
    ] = False,
    roofline: Annotated[
        str | None,
        typer.Option(help="Also calculate the least time on a card: h100, h200, a100, l4 or rtx4090."),
    ] = None,
) -> None:
    """Run the pipeline once optimized, and print what ran."""
    from fdcompile.cli.configuration import prepare
    from fdcompile.cli.sampling import ask, headline
    from fdcompile.graph.roofline import CARDS
    from fdcompile.measure.roofline import roofline_report

    if roofline is not None and roofline not in CARDS:
        raise typer.BadParameter(f"{roofline}: expected one of {', '.join(CARDS)}", param_hint="--roofline")
    sampling = ask(loading, asking)
    pipe, config = prepare(loading, sampling, running)
    head = headline(pipe, config, sampling)
    fdcompile.optimize(pipe, config)(**sampling.call())
    report = fdcompile.explain(pipe)
    programs = report.programs if verbose else ()
    least = () if roofline is None else (roofline_report(report, roofline),)
    print(*programs, head, report, *least, sep="\n\n")
