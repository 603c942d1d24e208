"""The same prompts made by a stock and by an optimised pipeline."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

import fdcompile
from fdcompile.command.loading import tell
from fdcompile.command.sampling import Sampling, sample
from fdcompile.planning.metrics import Pictures, psnr, ssim

if TYPE_CHECKING:
    from fdcompile.config import Config
    from fdcompile.miniature.scenes import Scene
    from fdcompile.runtime.report import Report

TIMED_PAIRS = 3


@dataclass(frozen=True)
class Comparison:
    """A stock and an optimised run of the same prompts and seeds.

    Attributes:
        sampling: what both were asked for.
        stock, optimised: their pictures.
        stock_calls: calls of the stock UNet in one run.
        report: what the optimised run did.
        time_ratios: time of an optimised pipeline call over that of the stock call made just before it.
    """

    sampling: Sampling
    stock: Pictures
    optimised: Pictures
    stock_calls: int
    report: Report
    time_ratios: tuple[float, ...]


def compare(pipe: Any, config: Config, sampling: Sampling) -> Comparison:
    """Runs `pipe` as it is and an optimised twin of it, each once to warm up and then alternately for time."""
    optimised = fdcompile.optimize(_twin(pipe), config)
    calls: list[object] = []
    counter = pipe.unet.register_forward_hook(lambda *_: calls.append(None))
    stock_pictures, _ = _timed(pipe, sampling, "stock, warm-up")
    counter.remove()
    optimised_pictures, _ = _timed(optimised, sampling, "optimised, compiling and warm-up")
    ratios = []
    for pair in range(1, TIMED_PAIRS + 1):
        _, stock_seconds = _timed(pipe, sampling, f"stock, timed {pair} of {TIMED_PAIRS}")
        _, optimised_seconds = _timed(optimised, sampling, f"optimised, timed {pair} of {TIMED_PAIRS}")
        ratios.append(optimised_seconds / stock_seconds)
    report = fdcompile.explain(optimised)
    return Comparison(sampling, stock_pictures, optimised_pictures, len(calls), report, tuple(ratios))


def _twin(pipe: Any) -> Any:
    """A second pipeline on the same weights, so that one can be optimised while the other stays stock."""
    weights = {id(tensor): tensor for tensor in itertools.chain(pipe.unet.parameters(), pipe.unet.buffers())}
    twin = copy.copy(pipe)
    twin.unet = copy.deepcopy(pipe.unet, weights)
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    return twin


def _timed(pipe: Any, sampling: Sampling, phase: str) -> tuple[Pictures, float]:
    """Pictures and seconds of one pipeline call, which ends with the pictures in main memory."""
    tell(phase)
    pipe.set_progress_bar_config(desc=phase, leave=False, disable=None)
    began = time.perf_counter()
    pictures = sample(pipe, sampling)
    return pictures, time.perf_counter() - began


def table(comparison: Comparison, scenes: Sequence[Scene] | None = None) -> Table:
    """What both runs cost and how close they are; `scenes` lets the checker read the miniature's pictures."""
    report, calls, ratios = comparison.report, comparison.stock_calls, comparison.time_ratios
    stock, optimised = comparison.stock, comparison.optimised
    work, stock_work = (flops / len(stock) / 1e9 for flops in (report.flops, report.stock_flops))
    paired = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    rows = [
        ("GFLOP per image", f"{stock_work:.4g}", f"{work:.4g} ({work / stock_work:.3f} of stock)"),
        ("encoder runs", f"{calls}", f"{report.encoder_runs}"),
        ("decoder evaluations", f"{calls} in {calls} calls", _decoder(report)),
        ("time of a pipeline call", "1", f"{statistics.median(ratios):.2f} (median of {paired})"),
        ("PSNR to stock, median", "", f"{np.median(psnr(optimised, stock)):.1f} dB"),
        ("SSIM to stock, median", "", f"{np.median(ssim(optimised, stock)):.3f}"),
    ]
    if scenes is not None:
        rows.append(("scenes read correctly", _read(stock, scenes), _read(optimised, scenes)))
    printed = Table("", "stock", "optimised", box=SIMPLE_HEAD)
    for row in rows:
        printed.add_row(*row)
    return printed


def _decoder(report: Report) -> str:
    return f"{report.decoder_evaluations} in {report.decoder_calls} calls"


def _read(pictures: Pictures, scenes: Sequence[Scene]) -> str:
    from fdcompile.miniature.checker import accuracy

    return f"{round(accuracy(pictures, scenes) * len(scenes))} of {len(scenes)}"
