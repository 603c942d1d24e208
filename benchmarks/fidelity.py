"""Fidelity of encoder propagation on the bundled miniature, compared with other methods at the same work.

    python -m benchmarks.fidelity [--images N] [--output FOLDER]

Writes `fidelity.md` (one table) and `fidelity.json`. Measures no times.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

import fdcompile
from benchmarks.candidates import deep_cache
from benchmarks.report import finite
from benchmarks.workbench import Made, Workbench
from fdcompile import DECODER, PARTIAL_ENCODER, Config, NoiseInjection, Plan, deep_feature_caching
from fdcompile.measure.calls import seeded_batches
from fdcompile.measure.markdown import markdown_table
from fdcompile.measure.metrics import psnr, ssim
from fdcompile.measure.variant import Variant
from fdcompile.miniature import GUIDANCE, PLANS
from fdcompile.miniature.checker import number_correct
from fdcompile.miniature.scenes import Scene, evaluation_scenes

BATCH = 12
SEED = 0
DEEP_CACHES = {deep_cache(n): n for n in (2, 3, 5)}
"""Interval of each DeepCache patch."""

CONVERGED = Variant("converged", steps=200, sampler="DPM-Solver++")
"""Variant for the images that all samplers converge to."""

FEWER = "control: stock with fewer steps"


def methods(levels: int) -> list[Variant]:
    """Returns the rows of the table for a UNet of `levels` levels. The first row of each sampler is its reference."""
    ddim, dpm = Plan.load(PLANS / "ddim-50.json"), Plan.load(PLANS / "dpm-solver++-20.json")
    nine = next(point for point in ddim.points if point.encoder_runs == 9)
    paper = Variant("encoder propagation, paper's keys", Config.paper())
    default = Variant("default, half of the steps", Config())
    ddim_rows = [
        Variant("stock"),
        paper,
        *(Variant(f"encoder propagation, stride {stride}", Config(key_steps=stride)) for stride in (2, 3, 6, 12)),
        Variant(
            "encoder propagation, paper's keys and noise injection", Config.paper(noise_injection=NoiseInjection())
        ),
        Variant("encoder propagation, paper's keys, linear forecast", Config.paper(forecast="linear")),
        Variant("encoder propagation, 9 keys from the schedule", Config(recompute=DECODER, work=9 / 50)),
        Variant("encoder propagation, 9 planned keys and forecast", replace(ddim.configured(nine), recompute=DECODER)),
        Variant("partial encoder propagation, paper's keys", Config.paper(recompute=PARTIAL_ENCODER)),
        Variant("deep-feature caching, paper's keys", Config.paper(recompute=deep_feature_caching(levels))),
        Variant("control: output reuse, paper's keys", Config.paper(recompute=())),
        default,
        Variant(FEWER, steps=25),
        *_planned(ddim, (0.24, 0.32, 0.5)),
        *_deep_caches((2, 3, 5)),
    ]
    dpm_rows = [
        Variant("stock"),
        paper,
        default,
        Variant(FEWER, steps=10),
        *_planned(dpm, (0.4, 0.5, 0.6)),
        *_deep_caches((2, 3)),
    ]
    return [
        *(replace(row, steps=row.steps or 50, sampler="DDIM") for row in ddim_rows),
        *(replace(row, steps=row.steps or 20, sampler="DPM-Solver++") for row in dpm_rows),
    ]


def _planned(plan: Plan, shares: Sequence[float]) -> list[Variant]:
    """Returns a row of `plan` for each share of the work, each followed by its fewer-steps baseline."""
    rows = []
    for share in shares:
        rows.append(Variant(f"planned, at most {share} of the work", plan.config(work=share)))
        baseline = plan.baseline(plan.point(work=share))
        assert baseline is not None
        rows.append(Variant(FEWER, steps=baseline.steps))
    return rows


def _deep_caches(intervals: Sequence[int]) -> list[Variant]:
    """Returns rows with DeepCache, which supports uniform intervals only, so none with planned key steps."""
    if find_spec("DeepCache") is None:
        return []
    return [Variant(patch.name, patch=patch) for patch, interval in DEEP_CACHES.items() if interval in intervals]


@dataclass(frozen=True)
class Row:
    """Results of a method.

    Attributes:
        method: name of the method.
        sampler: name of the sampler.
        steps: sampling steps.
        encoder_runs: encoder runs in one run of the sampler.
        gflop: GFLOP of the UNet per image.
        share: `gflop` as a share of that of the sampler's reference.
        correct: share of the images in which every attribute is right.
        psnr: median PSNR in dB to the images of the reference; None for the reference itself.
        ssim: median SSIM to the images of the reference; None for the reference itself.
        converged: median PSNR in dB to the images of `CONVERGED`.
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
    converged: float

    @property
    def cells(self) -> tuple[str, ...]:
        return (
            self.method,
            f"{self.sampler}, {self.steps}",
            f"{self.encoder_runs}",
            f"{self.gflop:.1f}",
            f"{self.share:.3f}",
            f"{self.correct:.1%}",
            "" if self.psnr is None else f"{self.psnr:.1f}",
            "" if self.ssim is None else f"{self.ssim:.3f}",
            f"{self.converged:.1f}",
        )


class Bench:
    """The miniature, with the stock images of each sampler so far."""

    def __init__(self, scenes: list[Scene]) -> None:
        self._scenes = scenes
        self._workbench = Workbench(fdcompile.load_miniature())
        self._references: dict[str, Made] = {}
        self._converged = self._run(CONVERGED).images

    @property
    def levels(self) -> int:
        return len(self._workbench.stock.unet.config.block_out_channels)

    def row(self, variant: Variant) -> Row:
        assert variant.sampler is not None
        assert variant.steps is not None
        made = self._run(variant)
        reference = self._references.setdefault(variant.sampler, made)
        is_reference, interval = reference is made, DEEP_CACHES.get(variant.patch)
        return Row(
            method=variant.name,
            sampler=variant.sampler,
            steps=variant.steps,
            encoder_runs=made.unet_calls if interval is None else math.ceil(variant.steps / interval),
            gflop=made.flops / 1e9,
            share=made.flops / reference.flops,
            correct=number_correct(made.images, self._scenes) / len(self._scenes),
            psnr=None if is_reference else float(np.median(psnr(made.images, reference.images))),
            ssim=None if is_reference else float(np.median(ssim(made.images, reference.images))),
            converged=float(np.median(psnr(made.images, self._converged))),
        )

    def _run(self, variant: Variant) -> Made:
        prompts = [scene.caption for scene in self._scenes]
        common = {"num_inference_steps": variant.steps, "guidance_scale": GUIDANCE}
        return self._workbench.run(variant, seeded_batches(prompts, SEED, BATCH, **common))


def markdown(rows: list[Row], about: dict[str, Any]) -> str:
    images = about["images"]
    names = "method", "sampler", "encoder runs", "GFLOP per image", "of stock", "read correctly", "PSNR", "SSIM"
    table = markdown_table((*names, "converged"), *(row.cells for row in rows))
    return f"""\
{table}

The bundled miniature, {images} prompts that it was not trained on, one image each, guidance {about["guidance"]:g}, \
the same noise in every row (seeds {about["seed"]} to {about["seed"] + images - 1}); torch {about["torch"]}, \
diffusers {about["diffusers"]}, CPU, fp32. GFLOP are the UNet's, guidance included. *Read correctly*: the \
checker finds every attribute as asked; one image is {100 / images:.1f} points. PSNR (dB) and SSIM: median over the \
images, each to the image of the sampler's stock row, also for stock runs with fewer steps; *converged*: PSNR to \
the image of {CONVERGED.sampler} with {CONVERGED.steps} steps. The plans were made with other prompts. "At most" \
is of the FLOPs; the control after a planned row has the steps that at least the same work buys.

This table may be used to see that the compiler computes what a method says, that all parts work together, and whether \
a method loses content grossly. It must not be used to rank methods for Stable Diffusion 1.5 or any other real model: \
these scenes are easy, and few sampling steps suffice for them. Output reuse under DDIM with eta = 0 *is* DDIM on the \
key steps alone (a reused noise prediction goes on along the same DDIM step): it is the control that every cut has to \
face, not a method of its own.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96, help="images per method (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", help="folder of the two files (default: here)"
    )
    arguments = parser.parse_args()
    if not 1 <= arguments.images <= (most := len(evaluation_scenes())):
        parser.error(f"--images {arguments.images}: expected 1 to {most}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(evaluation_scenes(arguments.images))
    plan = methods(bench.levels)
    rows = []
    for number, method in enumerate(plan, start=1):
        print(f"{number:>2} of {len(plan)}  {method.name} ({method.sampler}, {method.steps})", flush=True)
        rows.append(bench.row(method))
    about = {
        "images": arguments.images,
        "seed": SEED,
        "guidance": GUIDANCE,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    text = markdown(rows, about)
    (arguments.output / "fidelity.md").write_text(text, encoding="utf-8")
    results = {"about": about, "rows": [finite(asdict(row)) for row in rows]}
    (arguments.output / "fidelity.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
