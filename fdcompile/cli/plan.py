"""``fdcompile plan``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

import fdcompile
from fdcompile.cli.errors import UserError, blame_user
from fdcompile.cli.options import (
    MOST_STEPS,
    Guidance,
    ModelOptions,
    PlottedReportFile,
    PromptsFile,
    Steps,
    drawn_file,
    grouped,
    integer,
    output_file,
)

MINIATURE_PROMPTS = 16
"""Default number of planning captions for the miniature."""


@grouped
def plan(
    loading: ModelOptions,
    *,
    output: Annotated[Path, typer.Option(metavar="FILE", callback=output_file(), help="Plan to write, JSON.")],
    prompts: PromptsFile = None,
    steps: Steps = 50,
    guidance: Guidance = None,
    converged: Annotated[
        int | None,
        typer.Option(
            parser=integer(1, MOST_STEPS), metavar="N", help="Also compare with stock runs of this many steps."
        ),
    ] = None,
    samplers: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Also compare these samplers, such as ddim,dpm,unipc,euler, at the same work by their PSNR to stock "
            "runs of --converged steps (then 200 by default).",
        ),
    ] = "",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=drawn_file(), help="Plot to write: work against PSNR.")
    ] = None,
    report: PlottedReportFile = None,
) -> None:
    """Measure which key steps, cut and forecast suit a model, and write them to a plan."""
    from fdcompile.cli.loading import load_pipe
    from fdcompile.cli.progress import progress_bar
    from fdcompile.cli.report import describe, save
    from fdcompile.cli.sampling import asked_prompts, call_arguments, suited_guidance
    from fdcompile.measure.report import HtmlReport, finding
    from fdcompile.miniature.scenes import planning_scenes

    if converged is not None and converged < steps:
        raise UserError(f"--converged {converged}: expected at least the {steps} of --steps")
    captions = [scene.caption for scene in planning_scenes(MINIATURE_PROMPTS)]
    calls = asked_prompts(loading, prompts, captions)
    common = call_arguments(steps, suited_guidance(loading, guidance))
    pipe = load_pipe(loading)
    with blame_user(TypeError, ValueError, fdcompile.CaptureError), progress_bar() as progress:
        compared = tuple(filter(None, samplers.replace(" ", "").split(",")))
        result = fdcompile.plan(pipe, calls, converged=converged, samplers=compared, progress=progress, **common)
    print(f"{result}\n", flush=True)
    with blame_user(OSError):
        result.save(output)
    best = result.recommended()
    use = f"fdcompile demo --plan {output} --work {math.ceil(100 * (best or result.points[-1]).work) / 100:.2f}"
    if best is not None:
        use = f"fdcompile.optimize(pipe, fdcompile.Plan.load({str(output)!r})), or {use}"
    print(f"{output}: {use}")
    if plot is not None:
        with blame_user(OSError):
            result.plot(plot)
    if report is not None:
        baseline = None if best is None else result.baseline(best)
        steps_and_psnr = None if baseline is None else (baseline.steps, baseline.fidelity.psnr)
        first = result.verdict() if best is None else finding("Planned", best.fidelity.psnr, best.work, steps_and_psnr)
        page = HtmlReport(f"Plan: {describe(pipe, steps, common.get('guidance_scale'))}", first)
        note = "" if best is None else f"The circle is the recommended point: {use}"
        page.plot(
            "Work against fidelity", result.drawing(), "Share of stock's FLOPs against PSNR to stock, as below", note
        )
        page.text("Verdict", result.verdict())
        names, *rows = result.rows()
        note = (
            "Work is a share of stock's FLOPs; PSNR is in dB, of images and of latents. Cut: what is recomputed at "
            "every step; the cheapest cut recomputes nothing and reuses the output. Forecast: whether features between "
            "key steps are held, extrapolated linearly, or combined with fitted weights. Fewer steps: steps of stock "
            "at the same work, and their PSNR."
        )
        page.table("Points", names, rows, note)
        if result.samplers:
            names, *rows = result.sampler_rows()
            note = (
                "UNet runs are FLOPs per image in units of a stock call; converged is the PSNR in dB to stock "
                f"images of many steps. {result.sampler_verdict()}"
            )
            page.table("Samplers", names, rows, note)
        save(page, pipe, report)
