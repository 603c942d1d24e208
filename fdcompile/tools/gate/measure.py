"""Measures a configuration: exact figures, fidelity, and time compared with stock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fdcompile.api import explain, optimize
from fdcompile.config import Config
from fdcompile.measure.calls import Call, run_call
from fdcompile.measure.fidelity import compute_fidelity
from fdcompile.measure.timing import Pairs, device_timer, time_pairs
from fdcompile.pipeline.clone import clone

if TYPE_CHECKING:
    from fdcompile.miniature.scenes import Scene
    from fdcompile.report import Report

PSNR, SSIM, READ = "PSNR to stock, dB", "SSIM to stock", "scenes read correctly"
EXACTNESS = "latent PSNR to stock with every step a key step, dB"


def measure(
    pipe: Any, config: Config, call: Call, scenes: Sequence[Scene] | None = None
) -> tuple[dict[str, int], dict[str, float], Pairs]:
    """Makes the images of `call` stock, with `config`, and with every step a key step, on a clone of `pipe`.

    Args:
        pipe: a stock pipeline; it is not changed.
        config: the configuration to measure.
        call: keyword arguments of the pipeline, with generators, so that the noise is the same each time.
        scenes: scenes that the miniature's images must show; None for other models.

    Returns:
        Exact figures and fidelity as in `Baseline`, and times of optimized calls, each after a stock one.

    Raises:
        CaptureError: the UNet cannot be exported.
    """
    stock = run_call(pipe, call)
    optimized = optimize(
        clone(pipe), replace(config, key_steps="all", forecast="hold", plan=None, noise_injection=None)
    )
    exactness = compute_fidelity([run_call(optimized, call)], [stock]).latent_psnr
    optimize(optimized, config)
    first = run_call(optimized, call)
    run_call(optimized, call)
    exact = run_figures(explain(optimized))
    closeness = compute_fidelity([first], [stock])
    fidelity = {PSNR: closeness.psnr, EXACTNESS: exactness}
    if closeness.ssim is not None:
        fidelity[SSIM] = closeness.ssim
    if scenes is not None and first.images is not None:
        from fdcompile.miniature.checker import number_correct

        fidelity[READ] = number_correct(first.images, scenes)
    pairs = time_pairs(lambda: run_call(optimized, call), lambda: run_call(pipe, call), device_timer(pipe.device))
    return exact, fidelity, pairs


def run_figures(report: Report) -> dict[str, int]:
    """Returns the exact figures of a run that is not the first one, in which nothing may be captured or compiled."""
    counted = {
        "FLOPs": report.flops,
        "FLOPs, stock": report.stock_flops,
        "steps": report.num_steps,
        "encoder runs": report.encoder_runs,
        "decoder evaluations": report.decoder_evaluations,
        "stock UNet calls": report.stock_calls,
        "captures and compilations for a second image": len(report.compile_seconds),
        "programs": report.programs_held,
    }
    operations: Counter[str] = Counter()
    for program in report.programs:
        for name, stage in program.stages.items():
            operations.update({f"{name} / {op}": count for op, count in stage.op_counts.items()})
    calls = {f"{name} / calls": count for name, count in report.stage_calls.items()}
    flops = {f"{name} / FLOPs": count for name, count in report.stage_flops.items()}
    return counted | calls | flops | operations
