"""``fdcompile gate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fdcompile.cli.options import ModelOptions, RunOptions, SamplingOptions, grouped, output_file

_DIFFERS = 1


@grouped
def gate(
    loading: ModelOptions,
    asking: SamplingOptions,
    running: RunOptions,
    *,
    baseline: Annotated[
        Path, typer.Option(metavar="FILE", callback=output_file(), help="Baseline to compare with, JSON.")
    ],
    update: Annotated[bool, typer.Option("--update", help="Write the measured figures as the new baseline.")] = False,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=output_file(), help="Also write the result as JUnit XML.")
    ] = None,
) -> int:
    """Compare a model's figures and fidelity with a baseline file, and fail if they got worse; for CI."""
    import fdcompile
    from fdcompile.cli.configuration import prepare
    from fdcompile.cli.errors import UserError, blame_user
    from fdcompile.cli.progress import progress_bar
    from fdcompile.cli.sampling import ask
    from fdcompile.tools.gate.baseline import Baseline
    from fdcompile.tools.gate.junit import write_junit

    sampling = ask(loading, asking)
    if not update:
        if not baseline.is_file():
            raise UserError(f"there is no {baseline}: write it with --update")
        with blame_user(ValueError, OSError):
            Baseline.load(baseline)
    pipe, config = prepare(loading, sampling, running)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"baseline": baseline, "update": update, "seed": sampling.seed}
    with blame_user(ValueError, OSError, fdcompile.CaptureError), progress_bar() as progress:
        result = fdcompile.gate(pipe, sampling.prompts, config, progress=progress, **options, **sampling.common())
    if update:
        exact, fidelity = len(result.measured.exact), len(result.measured.fidelity)
        print(f"{exact} exact figures and {fidelity} of fidelity written to {baseline}")
        return 0
    print(result)
    if junit is not None:
        write_junit(result.findings, junit)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(f"### fdcompile gate\n\n{result}\n")
    return 0 if result.passed else _DIFFERS
