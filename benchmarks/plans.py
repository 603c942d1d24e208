"""Plans for samplers, guidance scales and seeds other than those of the plans shipped with the miniature.

    python -m benchmarks.plans [--images N] [--output FOLDER]

Writes `plans.md`. Measures no times.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch

import fdcompile
from benchmarks.workbench import Workbench
from fdcompile import Config, Plan
from fdcompile.cli.plan import MINIATURE_PROMPTS
from fdcompile.measure.calls import seeded_batches
from fdcompile.measure.markdown import markdown_table
from fdcompile.measure.metrics import Images, psnr
from fdcompile.measure.variant import Variant
from fdcompile.miniature import GUIDANCE, PLANS
from fdcompile.miniature.scenes import evaluation_scenes, planning_scenes

BATCH = 12
DPM, DDIM = "DPMSolverMultistepScheduler", "DDIMScheduler"
MADE = ((DPM, 2.0), (DPM, 5.0), (DPM, 7.5), ("EulerDiscreteScheduler", 3.0), ("UniPCMultistepScheduler", 3.0))
"""Samplers and guidance scales that plans are made for."""

STEPS = 20
SHARES = (0.4, 0.5, 0.6)
DDIM_SHARES = (0.18, 0.24, 0.32, 0.5)
ELSEWHERE = (2.0, 4.0, 5.0)
"""Guidance scales at which a plan made for another scale is used."""

OTHER_SEED = 10_000


@dataclass(frozen=True)
class Asked:
    """Arguments that all images of a comparison share."""

    sampler: str
    steps: int
    guidance: float = GUIDANCE
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """A point of a plan and its fewer-steps baseline: median PSNR to stock, in dB."""

    what: str
    asked: Asked
    work: float
    planned: float
    fewer_steps: int
    fewer: float

    @property
    def cells(self) -> tuple[str, ...]:
        asked, fewer = self.asked, f"{self.fewer_steps}: {self.fewer:.1f}"
        common = self.what, asked.sampler.removesuffix("Scheduler"), f"{asked.steps}", f"{asked.guidance:g}"
        return *common, f"{self.work:.3f}", f"{self.planned:.1f}", fewer, f"{self.planned - self.fewer:+.1f}"


class Comparison:
    """The miniature, with scenes that no plan was made with."""

    def __init__(self, images: int) -> None:
        self._prompts = [scene.caption for scene in evaluation_scenes()[:images]]
        self._bench = Workbench(fdcompile.load_miniature())

    def make(self, asked: Asked) -> Plan:
        """Makes a plan as ``fdcompile plan`` does."""
        pipe = self._bench.pipe(Variant("stock", sampler=asked.sampler))
        prompts = [scene.caption for scene in planning_scenes(MINIATURE_PROMPTS)]
        return fdcompile.plan(pipe, prompts, num_inference_steps=asked.steps, guidance_scale=asked.guidance)

    def rows(self, what: str, plan: Plan, asked: Asked, shares: tuple[float, ...]) -> Iterator[Row]:
        expected = self._images(None, asked, asked.steps)
        for share in shares:
            point = plan.point(work=share)
            baseline = plan.baseline(point)
            assert baseline is not None
            planned = self._images(plan.configured(point), asked, asked.steps)
            fewer = self._images(None, asked, baseline.steps)
            closeness = [float(np.median(psnr(images, expected))) for images in (planned, fewer)]
            yield Row(what, asked, point.work, closeness[0], baseline.steps, closeness[1])

    def _images(self, config: Config | None, asked: Asked, steps: int) -> Images:
        common = {"num_inference_steps": steps, "guidance_scale": asked.guidance}
        calls = seeded_batches(self._prompts, asked.seed, BATCH, **common)
        return self._bench.run(Variant("planned", config, sampler=asked.sampler), calls).images


def measure(comparison: Comparison) -> Iterator[Row]:
    """Measures plans made for other samplers and guidance scales, and shipped ones with other seeds and guidance."""
    for sampler, guidance in MADE:
        asked = Asked(sampler, STEPS, guidance)
        yield from comparison.rows("made for this", comparison.make(asked), asked, SHARES)
    ddim, dpm = Plan.load(PLANS / "ddim-50.json"), Plan.load(PLANS / "dpm-solver++-20.json")
    for seed in (0, OTHER_SEED):
        yield from comparison.rows(f"shipped, seeds from {seed}", ddim, Asked(DDIM, 50, seed=seed), DDIM_SHARES)
        yield from comparison.rows(f"shipped, seeds from {seed}", dpm, Asked(DPM, STEPS, seed=seed), SHARES)
    for guidance in ELSEWHERE:
        yield from comparison.rows("made for guidance 3", dpm, Asked(DPM, STEPS, guidance), SHARES)


def markdown(rows: list[Row], images: int) -> str:
    names = "plan", "sampler", "steps", "guidance", "FLOPs of stock", "planned", "stock with fewer steps", "closer by"
    table = markdown_table(names, *(row.cells for row in rows))
    return f"""\
{table}

The bundled miniature: PSNR in dB, medians of {images} images to those of the same sampler, stock, with all steps \
and the same noise. Plans were made with {MINIATURE_PROMPTS} other prompts, the shipped one for DDIM with 12. A plan \
used at another guidance than it was made for holds its features, and `explain` says so. \
Torch {torch.__version__}, diffusers {diffusers.__version__}, CPU, fp32.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24, help="images per comparison (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder (default: here)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in measure(Comparison(arguments.images)):
        rows.append(row)
        print(*row.cells, sep="  ", flush=True)
    (arguments.output / "plans.md").write_text(markdown(rows, arguments.images), encoding="utf-8")


if __name__ == "__main__":
    main()
