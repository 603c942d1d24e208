"""The same prompts made by a stock and by an optimised pipeline, side by side."""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fdcompile.command.metrics import Pictures, psnr, ssim

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    from fdcompile.config import Config
    from fdcompile.miniature.scenes import Scene
    from fdcompile.runtime.report import Report

MINIATURE_GUIDANCE = 3.0
"""The guidance scale that the miniature's model card recommends."""

MAX_PROMPTS = 16
"""All prompts are sampled in one batch; this many keep it below the batch at which diffusers' upsampler branches."""

TIMED_PAIRS = 3

_AMPLIFICATION = 4
_TILE = 160  # pixels that a narrower picture is scaled up to
_MARGIN = 14
_HEADER = 56
_LABEL_WIDTH = 260
_LABEL_CHARACTERS = 34
_LINE = 20
_INK, _GREY, _PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


@dataclass(frozen=True)
class Sampling:
    """What a pipeline is asked for.

    Attributes:
        prompts: one picture each.
        steps: sampling steps.
        guidance: guidance scale; None leaves it to the pipeline.
        seed: picture ``i`` starts from noise of seed ``seed + i``, whatever the batch.
    """

    prompts: tuple[str, ...]
    steps: int = 50
    guidance: float | None = None
    seed: int = 0


def sample(pipe: Any, sampling: Sampling) -> Pictures:
    """Calls `pipe` once for all prompts and returns its pictures."""
    import torch

    seeds = range(sampling.seed, sampling.seed + len(sampling.prompts))
    guidance = {} if sampling.guidance is None else {"guidance_scale": sampling.guidance}
    output = pipe(
        list(sampling.prompts),
        num_inference_steps=sampling.steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **guidance,
    )
    return np.stack([np.asarray(image.convert("RGB")) for image in output.images])


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
    from fdcompile.api import explain, optimize

    optimised = optimize(_twin(pipe), config)
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
    report = explain(optimised)
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
    print(f"  {phase}", file=sys.stderr, flush=True)
    pipe.set_progress_bar_config(desc=phase, leave=False, disable=None)
    began = time.perf_counter()
    pictures = sample(pipe, sampling)
    return pictures, time.perf_counter() - began


def table(comparison: Comparison, scenes: Sequence[Scene] | None = None) -> str:
    """What both runs cost and how close they are; `scenes` lets the checker read the miniature's pictures."""
    report, calls, ratios = comparison.report, comparison.stock_calls, comparison.time_ratios
    stock, optimised = comparison.stock, comparison.optimised
    work, stock_work = (flops / len(stock) / 1e9 for flops in (report.flops, report.stock_flops))
    paired = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    rows = [
        ("", "stock", "optimised"),
        ("GFLOP per image", f"{stock_work:.4g}", f"{work:.4g} ({work / stock_work:.3f} of stock)"),
        ("encoder runs", f"{calls}", f"{report.encoder_runs}"),
        ("decoder evaluations", f"{calls} in {calls} calls", _decoder(report)),
        ("time of a pipeline call", "1", f"{statistics.median(ratios):.2f} (median of {paired})"),
        ("PSNR to stock, median", "", f"{np.median(psnr(optimised, stock)):.1f} dB"),
        ("SSIM to stock, median", "", f"{np.median(ssim(optimised, stock)):.3f}"),
    ]
    if scenes is not None:
        rows.append(("scenes read correctly", _read(stock, scenes), _read(optimised, scenes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _decoder(report: Report) -> str:
    return f"{report.decoder_evaluations} in {report.decoder_calls} calls"


def _read(pictures: Pictures, scenes: Sequence[Scene]) -> str:
    from fdcompile.miniature.checker import accuracy

    return f"{round(accuracy(pictures, scenes) * len(scenes))} of {len(scenes)}"


def sheet(comparison: Comparison) -> Image.Image:
    """One picture: a row for each prompt with its stock and its optimised picture and their difference."""
    from PIL import Image, ImageDraw

    stock, optimised = comparison.stock, comparison.optimised
    difference = np.abs(stock.astype(np.int16) - optimised) * _AMPLIFICATION
    columns = (
        ("stock", f"{comparison.stock_calls} encoder runs", stock),
        ("optimised", f"{comparison.report.encoder_runs} encoder runs", optimised),
        ("difference", f"amplified {_AMPLIFICATION} times", difference.clip(0, 255).astype(np.uint8)),
    )
    count, height, width = stock.shape[:3]
    scale = max(1, _TILE // width)
    tile = (width * scale, height * scale)
    page = (_LABEL_WIDTH + len(columns) * (tile[0] + _MARGIN), _HEADER + count * (tile[1] + _MARGIN))
    image = Image.new("RGB", page, _PAPER)
    draw = ImageDraw.Draw(image)
    for row, prompt in enumerate(comparison.sampling.prompts):
        _draw_label(draw, prompt, _HEADER + row * (tile[1] + _MARGIN), tile[1])
    for column, (title, note, pictures) in enumerate(columns):
        left = _LABEL_WIDTH + column * (tile[0] + _MARGIN)
        draw.text((left + tile[0] // 2, 20), title, _INK, _font(17), anchor="mm")
        draw.text((left + tile[0] // 2, 41), note, _GREY, _font(13), anchor="mm")
        for row, picture in enumerate(pictures):
            scaled = Image.fromarray(picture).resize(tile, Image.Resampling.NEAREST)
            image.paste(scaled, (left, _HEADER + row * (tile[1] + _MARGIN)))
    return image


def _draw_label(draw: ImageDraw.ImageDraw, prompt: str, top: int, height: int) -> None:
    """The prompt in the left margin, wrapped, cut to the lines that fit and centred beside its pictures."""
    lines = textwrap.wrap(prompt, _LABEL_CHARACTERS, max_lines=max(1, height // _LINE), placeholder=" ...")
    first = top + (height - (len(lines) - 1) * _LINE) // 2
    for number, line in enumerate(lines):
        draw.text((_MARGIN, first + number * _LINE), line, _INK, _font(14), anchor="lm")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)
