"""The same prompts made by a stock pipeline and in other ways."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

import fdcompile
from fdcompile.cli.loading import tell
from fdcompile.cli.sampling import Sampling, sample
from fdcompile.measure.metrics import Pictures, psnr, ssim
from fdcompile.tools.evaluate.variants import Way

if TYPE_CHECKING:
    from fdcompile.miniature.scenes import Scene
    from fdcompile.runtime.report import Report

TIMED_PAIRS = 3


STOCK = Way("stock")


@dataclass
class Run:
    """What a way of making them came to.

    Attributes:
        unet_calls: of the stock UNet in one run, where it is not optimised.
        report: what an optimised run did.
        time_ratios: time of a pipeline call over that of the stock call made just before it.
    """

    way: Way
    pictures: Pictures
    unet_calls: int
    report: Report | None
    time_ratios: list[float] = field(default_factory=list)


def compare(pipe: Any, ways: Sequence[Way], sampling: Sampling) -> list[Run]:
    """Runs `pipe` stock and in each of `ways`, all once to warm up and then each alternately with stock for time.

    The first run is the stock one.
    """
    pipes = [pipe, *(pipe if way.config is None else way.of(pipe) for way in ways)]
    samplings = [replace(sampling, steps=way.steps or sampling.steps) for way in (STOCK, *ways)]
    runs = [_run(*own) for own in zip((STOCK, *ways), pipes, samplings, strict=True)]
    for pair in range(1, TIMED_PAIRS + 1):
        timed = f"timed {pair} of {TIMED_PAIRS}"
        for run, own, asked in zip(runs[1:], pipes[1:], samplings[1:], strict=True):
            stock_seconds = _timed(pipe, sampling, f"stock, {timed}")[1]
            run.time_ratios.append(_timed(own, asked, f"{run.way.name}, {timed}")[1] / stock_seconds)
    return runs


def _run(way: Way, pipe: Any, sampling: Sampling) -> Run:
    calls: list[object] = []
    if way.config is not None:
        pictures, _ = _timed(pipe, sampling, f"{way.name}, compiling and warm-up")
        return Run(way, pictures, 0, fdcompile.explain(pipe))
    counter = pipe.unet.register_forward_hook(lambda *_: calls.append(None))
    pictures, _ = _timed(pipe, sampling, f"{way.name}, warm-up")
    counter.remove()
    return Run(way, pictures, len(calls), None)


def _timed(pipe: Any, sampling: Sampling, phase: str) -> tuple[Pictures, float]:
    """Pictures and seconds of one pipeline call, which ends with the pictures in main memory."""
    tell(phase)
    pipe.set_progress_bar_config(desc=phase, leave=False, disable=None)
    began = time.perf_counter()
    pictures = sample(pipe, sampling)
    return pictures, time.perf_counter() - began


def cells(runs: Sequence[Run], scenes: Sequence[Scene] | None = None) -> dict[str, list[str]]:
    """What runs cost and how close they are to the first; `scenes` lets the checker read the miniature's pictures."""
    stock, *others = runs
    rows = {
        "GFLOP per image": [_work(run, runs) for run in runs],
        "encoder runs": [f"{run.report.encoder_runs if run.report else run.unet_calls}" for run in runs],
        "decoder evaluations": [_decoder(run) for run in runs],
        "time of a pipeline call": ["1", *(_time(run) for run in others)],
        "PSNR to stock, median": ["", *(f"{np.median(psnr(run.pictures, stock.pictures)):.1f} dB" for run in others)],
        "SSIM to stock, median": ["", *(f"{np.median(ssim(run.pictures, stock.pictures)):.3f}" for run in others)],
    }
    if scenes is not None:
        rows["scenes read correctly"] = [_read(run.pictures, scenes) for run in runs]
    return rows


def table(runs: Sequence[Run], rows: dict[str, list[str]]) -> Table:
    """`cells` for the terminal."""
    printed = Table("", *(run.way.name for run in runs), box=SIMPLE_HEAD)
    for name, own in rows.items():
        printed.add_row(name, *own)
    return printed


def _work(run: Run, runs: Sequence[Run]) -> str:
    """With its share of the first run's; what a stock run takes is known from any optimised one."""
    stock = next(own.report.stock_flops for own in runs if own.report is not None)
    flops = run.report.flops if run.report is not None else stock * run.unet_calls / runs[0].unet_calls
    share = "" if run is runs[0] else f" ({flops / stock:.3f} of stock)"
    return f"{flops / len(run.pictures) / 1e9:.4g}{share}"


def _decoder(run: Run) -> str:
    if run.report is None:
        return f"{run.unet_calls} in {run.unet_calls} calls"
    return f"{run.report.decoder_evaluations} in {run.report.decoder_calls} calls"


def _time(run: Run) -> str:
    paired = ", ".join(f"{ratio:.2f}" for ratio in run.time_ratios)
    return f"{statistics.median(run.time_ratios):.2f} (median of {paired})"


def _read(pictures: Pictures, scenes: Sequence[Scene]) -> str:
    from fdcompile.miniature.checker import accuracy

    return f"{round(accuracy(pictures, scenes) * len(scenes))} of {len(scenes)}"
