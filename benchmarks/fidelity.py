"""What encoder propagation costs in fidelity on the bundled miniature, beside what else the same work could buy.

    python -m benchmarks.fidelity [--images N] [--output FOLDER]

Writes `fidelity.md` (one table) and `fidelity.json`. Nothing in them is timed.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

import fdcompile
from fdcompile import PARTIAL_ENCODER, Config, NoiseInjection, deep_feature_caching
from fdcompile.command.sampling import MINIATURE_GUIDANCE, Sampling, sample
from fdcompile.miniature.checker import accuracy
from fdcompile.miniature.scenes import Scene, evaluation_scenes
from fdcompile.planning.metrics import Pictures, psnr, ssim

BATCH = 12
SEED = 0
HELD_OUT = 256  # evaluation scenes that the miniature was not trained on
SAMPLERS = {"DDIM": DDIMScheduler, "DPM-Solver++": DPMSolverMultistepScheduler}


@dataclass(frozen=True)
class Method:
    """A way to make a picture; `config` None is the stock pipeline."""

    name: str
    config: Config | None = None
    steps: int = 50
    sampler: str = "DDIM"


def methods(levels: int) -> list[Method]:
    """The rows of the table for a UNet of `levels` levels. The first one of each sampler is its reference."""
    return [
        Method("stock"),
        Method("encoder propagation, paper's keys", Config()),
        *(Method(f"encoder propagation, stride {stride}", Config(key_steps=stride)) for stride in (2, 3, 6, 12)),
        Method("encoder propagation, paper's keys and noise injection", Config(noise_injection=NoiseInjection())),
        Method("partial encoder propagation, paper's keys", Config(fresh=PARTIAL_ENCODER)),
        Method("deep-feature caching, paper's keys", Config(fresh=deep_feature_caching(levels))),
        Method("control: output reuse, paper's keys", Config(fresh=())),
        *(Method("control: stock with fewer steps", steps=steps) for steps in (25, 17, 9)),
        Method("stock", steps=20, sampler="DPM-Solver++"),
        Method("encoder propagation, paper's keys", Config(), steps=20, sampler="DPM-Solver++"),
    ]


@dataclass(frozen=True)
class Row:
    """What a method reached.

    Attributes:
        encoder_runs: in one run of the sampler.
        gflop: per image, of the UNet; `share` is `gflop` over that of the sampler's reference.
        correct: share of the pictures in which every attribute is right.
        psnr: median over the pictures, to the reference's, in dB; `ssim` likewise. None for the reference itself.
    """

    method: str
    sampler: str
    steps: int
    encoder_runs: int
    gflop: float
    share: float
    correct: float
    psnr: float | None
    ssim: float | None


class Bench:
    """The miniature twice, once stock and once optimised, and the stock pictures made so far."""

    def __init__(self, scenes: list[Scene]) -> None:
        self._scenes = scenes
        self._stock, self._optimised = fdcompile.load_miniature(), fdcompile.load_miniature()
        for pipe in (self._stock, self._optimised):
            pipe.set_progress_bar_config(disable=True)
        self._references: dict[str, tuple[Pictures, float]] = {}
        self._gflop_per_step = self._measure_step()

    @property
    def levels(self) -> int:
        return len(self._stock.unet.config.block_out_channels)

    def run(self, method: Method) -> Row:
        pictures, encoder_runs, gflop = self._sample(method)
        is_reference = method.sampler not in self._references
        reference, reference_gflop = self._references.setdefault(method.sampler, (pictures, gflop))
        return Row(
            method=method.name,
            sampler=method.sampler,
            steps=method.steps,
            encoder_runs=encoder_runs,
            gflop=gflop,
            share=gflop / reference_gflop,
            correct=accuracy(pictures, self._scenes),
            psnr=None if is_reference else float(np.median(psnr(pictures, reference))),
            ssim=None if is_reference else float(np.median(ssim(pictures, reference))),
        )

    def _sample(self, method: Method) -> tuple[Pictures, int, float]:
        """Pictures of all scenes, encoder runs and GFLOP per image."""
        pipe = self._stock if method.config is None else fdcompile.optimize(self._optimised, method.config)
        pipe.scheduler = SAMPLERS[method.sampler].from_config(pipe.scheduler.config)
        batches = [self._pictures(pipe, method.steps, first) for first in range(0, len(self._scenes), BATCH)]
        pictures = np.concatenate(batches)
        if method.config is None:
            return pictures, method.steps, method.steps * self._gflop_per_step
        report = fdcompile.explain(pipe)
        return pictures, report.encoder_runs, report.flops / len(batches[-1]) / 1e9

    def _pictures(self, pipe: Any, steps: int, first: int) -> Pictures:
        """One batch, from the scene `first` on."""
        prompts = tuple(scene.caption for scene in self._scenes[first : first + BATCH])
        return sample(pipe, Sampling(prompts, steps, MINIATURE_GUIDANCE, SEED + first))

    def _measure_step(self) -> float:
        """GFLOP of a step of the stock UNet per image: the samplers here call it once a step."""
        steps = 2
        pipe = fdcompile.optimize(self._optimised, Config(key_steps="all"))
        images = len(self._pictures(pipe, steps, 0))
        return fdcompile.explain(pipe).stock_flops / steps / images / 1e9


def markdown(rows: list[Row], about: dict[str, Any]) -> str:
    images = about["images"]
    head = "| method | sampler | encoder runs | GFLOP per image | of stock | read correctly | PSNR | SSIM |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        psnr_cell = "" if row.psnr is None else f"{row.psnr:.1f}"
        ssim_cell = "" if row.ssim is None else f"{row.ssim:.3f}"
        lines.append(
            f"| {row.method} | {row.sampler}, {row.steps} | {row.encoder_runs} | {row.gflop:.1f} | {row.share:.3f} "
            f"| {row.correct:.1%} | {psnr_cell} | {ssim_cell} |"
        )
    table = "\n".join(lines)
    return f"""\
{table}

The bundled miniature, {images} prompts that it was not trained on, one picture each, guidance {about["guidance"]:g}, \
the same noise in every row (seeds {about["seed"]} to {about["seed"] + images - 1}); torch {about["torch"]}, \
diffusers {about["diffusers"]}, CPU, fp32. GFLOP are the UNet's, guidance included. *Read correctly*: the \
checker finds every attribute as asked; one picture is {100 / images:.1f} points. PSNR (dB) and SSIM: median over the \
pictures, each to the picture of the sampler's stock row, also for stock runs with fewer steps.

This table may be used to see that the compiler computes what a method says, that all parts work together, and whether \
a method loses content grossly. It must not be used to rank methods for Stable Diffusion 1.5 or any other real model: \
these scenes are easy, and few sampling steps suffice for them. Output reuse under DDIM with eta = 0 *is* DDIM on the \
key steps alone (a reused noise prediction goes on along the same DDIM step): it is the control that every cut has to \
face, not a method of its own.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96, help="pictures per method (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", help="folder of the two files (default: here)"
    )
    arguments = parser.parse_args()
    if not 1 <= arguments.images <= HELD_OUT:
        parser.error(f"--images {arguments.images}: expected 1 to {HELD_OUT}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(evaluation_scenes(HELD_OUT)[: arguments.images])
    plan = methods(bench.levels)
    rows = []
    for number, method in enumerate(plan, start=1):
        print(f"{number:>2} of {len(plan)}  {method.name} ({method.sampler}, {method.steps})", flush=True)
        rows.append(bench.run(method))
    about = {
        "images": arguments.images,
        "seed": SEED,
        "guidance": MINIATURE_GUIDANCE,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    text = markdown(rows, about)
    (arguments.output / "fidelity.md").write_text(text, encoding="utf-8")
    results = {"about": about, "rows": [_finite(asdict(row)) for row in rows]}
    (arguments.output / "fidelity.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\n{text}")


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: the PSNR of identical pictures becomes the string "inf"."""
    return {name: "inf" if value == math.inf else value for name, value in row.items()}


if __name__ == "__main__":
    main()
