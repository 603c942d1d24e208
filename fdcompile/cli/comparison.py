"""Compares variants of a pipeline on one batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fdcompile.cli.progress import tell
from fdcompile.cli.sampling import Sampling
from fdcompile.measure.calls import as_images
from fdcompile.measure.cost import Work, count_work
from fdcompile.measure.fidelity import CLOSEST
from fdcompile.measure.metrics import Images, psnr, ssim
from fdcompile.measure.report import HtmlReport, finding
from fdcompile.measure.timeline import Timeline
from fdcompile.measure.timing import Pairs, device_timer, time_pairs
from fdcompile.measure.variant import Variant

if TYPE_CHECKING:
    from fdcompile.miniature.scenes import Scene

STOCK = Variant("stock")


@dataclass(frozen=True)
class Run:
    """A variant and its measurements.

    Attributes:
        work: work of the UNet.
        time: times of pipeline calls, each after a stock one.
    """

    variant: Variant
    images: Images
    work: Work
    time: Pairs


def compare(pipe: Any, variants: Sequence[Variant], sampling: Sampling) -> list[Run]:
    """Samples with stock `pipe` and with each of `variants`, and times each variant alternately with stock.

    Returns:
        One run for stock, then one for each variant.
    """
    runs = []
    for variant in (STOCK, *variants):
        variant_pipe = pipe if variant.config is None else variant.of(pipe)
        asked = replace(sampling, steps=variant.steps or sampling.steps)
        phase = "compiling and warm-up" if variant.config else "warm-up"
        first = partial(_sample, variant_pipe, asked, f"{variant.name}, {phase}")
        images, work = count_work(variant_pipe, first)
        time = Pairs(())
        if variant is not STOCK:
            time = time_pairs(
                partial(_sample, variant_pipe, asked, f"{variant.name}, timed"),
                partial(_sample, pipe, sampling, "stock, timed"),
                device_timer(pipe.device),
            )
        runs.append(Run(variant, images, work, time))
    return runs


def finding_of(runs: Sequence[Run]) -> str:
    """Compares the last optimized run with fewer steps, if those were run, in one sentence."""
    stock = runs[0]
    best = next(run for run in reversed(runs) if run.work.report is not None)
    psnr_of = {run.variant: float(np.median(psnr(run.images, stock.images)).clip(max=CLOSEST)) for run in runs[1:]}
    baseline = next(((run.work.unet_calls, psnr_of[run.variant]) for run in runs[1:] if run.work.report is None), None)
    return finding(best.variant.name, psnr_of[best.variant], best.work.flops / stock.work.flops, baseline)


def show(page: HtmlReport, runs: Sequence[Run], rows: dict[str, list[str]], prompts: Sequence[str]) -> None:
    """Adds images, figures and timelines to the page."""
    stock, *others = ((run.variant.name, run.images) for run in runs)
    page.compared("Images", stock, others, prompts)
    names = ["", *(run.variant.name for run in runs)]
    page.table("Cost and fidelity", names, [[name, *row] for name, row in rows.items()])
    timelines = [Timeline.of(run.variant.name, run.work.report) for run in runs if run.work.report is not None]
    page.timeline("What ran at which step", timelines)


def _sample(pipe: Any, sampling: Sampling, phase: str) -> Images:
    """Samples all prompts in one call."""
    tell(phase)
    pipe.set_progress_bar_config(desc=phase, leave=False, disable=None)
    return as_images(pipe(**sampling.call()).images)


def cells(runs: Sequence[Run], scenes: Sequence[Scene] | None = None) -> dict[str, list[str]]:
    """Returns rows of cost and fidelity of `runs`; with `scenes` also the number of correct images."""
    stock, *others = runs
    rows = {
        "GFLOP per image": [_gflop(run, stock) for run in runs],
        "encoder runs": [f"{run.work.unet_calls}" for run in runs],
        "decoder evaluations": [_decoder(run) for run in runs],
        "time of a pipeline call": ["", *(_time(run) for run in others)],
        "PSNR to stock, median": ["", *(f"{np.median(psnr(run.images, stock.images)):.1f} dB" for run in others)],
        "SSIM to stock, median": ["", *(f"{np.median(ssim(run.images, stock.images)):.3f}" for run in others)],
    }
    if scenes is not None:
        rows["scenes read correctly"] = [_read(run.images, scenes) for run in runs]
    return rows


def table(runs: Sequence[Run], rows: dict[str, list[str]]) -> Table:
    """Formats `rows` for the terminal."""
    printed = Table("", *(run.variant.name for run in runs), box=SIMPLE_HEAD)
    for name, row in rows.items():
        printed.add_row(name, *row)
    return printed


def _gflop(run: Run, stock: Run) -> str:
    share = "" if run is stock else f" ({run.work.flops / stock.work.flops:.3f} of stock)"
    return f"{run.work.flops / len(run.images) / 1e9:.4g}{share}"


def _decoder(run: Run) -> str:
    if run.work.report is None:
        return f"{run.work.unet_calls} in {run.work.unet_calls} calls"
    return f"{run.work.report.decoder_evaluations} in {run.work.report.decoder_calls} calls"


def _time(run: Run) -> str:
    seconds, stock = (f"{np.median(each):.3g} s" for each in (run.time.seconds, run.time.stock_seconds))
    return f"{run.time.ratio:.2f} of stock ({seconds}, stock just before {stock})"


def _read(images: Images, scenes: Sequence[Scene]) -> str:
    from fdcompile.miniature.checker import number_correct

    return f"{number_correct(images, scenes)} of {len(scenes)}"
