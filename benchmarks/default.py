"""The default compared with fewer steps at the same work: three models, four samplers, several guidance scales.

    python -m benchmarks.default [--images N] [--models NAME ...] [--records FILE]

Writes `default.md` and `default.json`. Images are made in chunks, whose figures are appended to the records. Existing
chunks are not made again, and both files are written from all records. Measures no times.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import diffusers
import numpy as np
import torch

import fdcompile
from benchmarks.candidates import deep_cache
from benchmarks.testbeds import TESTBEDS, load_testbed
from benchmarks.workbench import Made, Workbench
from fdcompile import DECODER, Config, Plan
from fdcompile.measure.calls import Call
from fdcompile.measure.fidelity import CLOSEST
from fdcompile.measure.markdown import markdown_table
from fdcompile.measure.metrics import psnr
from fdcompile.measure.variant import Variant
from fdcompile.miniature import PLANS
from fdcompile.miniature.scenes import evaluation_scenes

CHUNK = 32
"""Largest number of images in a call."""

CONVERGED = Variant("converged", steps=100, sampler="DPM-Solver++")
"""Variant for the images that all samplers converge to."""

GUIDANCE = {"miniature": (3.0, 5.0, 7.5), "digits": (1.0, 3.0, 5.0, 7.5), "emoji": (1.0, 3.0, 5.0, 7.5)}
"""Guidance scales of each model. Nothing has been fitted to the emoji."""

SAMPLERS = {
    "DDIM": 50,
    "DPM-Solver++": 20,
    "UniPCMultistepScheduler": 20,
    "EulerDiscreteScheduler": 30,
}
"""Number of steps of each sampler."""

NOISY = {"EulerAncestralDiscreteScheduler": 30, "DDPM": 50}
"""Likewise, of samplers that draw noise at each step."""

SHARES, FEWEST = (0.4, 0.5, 0.6), 0.2
"""Shares of the steps that are key steps; `FEWEST` only with 50 steps."""

USUAL = 3.0
"""Guidance scale at which other methods are also compared."""

PLANNED = {"DDIM": "ddim-50.json", "DPM-Solver++": "dpm-solver++-20.json"}
STOCK, DEFAULT, FEWER = "stock", "default", "fewer steps"


@dataclass(frozen=True)
class Case:
    """Arguments that all images of a comparison share."""

    model: str
    sampler: str
    steps: int
    guidance: float


@dataclass(frozen=True)
class Chunk:
    """Figures of a chunk of images of one method.

    Attributes:
        case: model, sampler, steps and guidance.
        method: name of the method.
        share: requested share of the work; None for methods that have no such parameter.
        first: number of the first image, which is also the seed of its noise.
        work: FLOPs of the UNet as a share of stock's.
        stock: PSNR in dB of each image to the stock image.
        converged: PSNR in dB of each image to the image of `CONVERGED`.
    """

    case: Case
    method: str
    share: float | None
    first: int
    work: float
    stock: list[float]
    converged: list[float]

    @property
    def key(self) -> tuple[Case, str, float | None, int]:
        return self.case, self.method, self.share, self.first


class Model:
    """A model that makes the same images with several methods."""

    def __init__(self, name: str, images: int) -> None:
        self._images = images
        self._testbed = TESTBEDS.get(name)
        self._bench = Workbench(fdcompile.load_miniature() if self._testbed is None else load_testbed(name))
        self._stock = lru_cache(maxsize=3)(self._run)

    def _run(self, variant: Variant, first: int, guidance: float) -> Made:
        images = range(first, min(first + CHUNK, self._images))
        call: Call = {"generator": [torch.Generator().manual_seed(image) for image in images]}
        if self._testbed is None:
            call["prompt"] = [scene.caption for scene in evaluation_scenes()[images.start : images.stop]]
        else:
            call["class_labels"] = [image % self._testbed.classes for image in images]
        return self._bench.run(variant, [call | {"num_inference_steps": variant.steps, "guidance_scale": guidance}])

    def measure(self, case: Case, variant: Variant, share: float | None, first: int) -> Chunk:
        stock = self._stock(Variant(STOCK, steps=case.steps, sampler=case.sampler), first, case.guidance)
        converged = self._stock(CONVERGED, first, case.guidance)
        made = (self._stock if variant.config is None else self._run)(variant, first, case.guidance)
        closeness = [
            psnr(made.images, other.images).clip(max=CLOSEST).round(2).tolist() for other in (stock, converged)
        ]
        return Chunk(case, variant.name, share, first, round(made.flops / stock.flops, 4), *closeness)


def methods(case: Case) -> Iterator[tuple[Variant, float | None]]:
    """Yields the methods to compare, each with the requested share of the work."""
    yield Variant(STOCK), None
    for share in (FEWEST, *SHARES) if case.steps == 50 else SHARES:
        yield Variant(DEFAULT, Config(work=share)), share
        yield Variant(FEWER, steps=round(share * case.steps)), share
    if case.guidance != USUAL or case.sampler in NOISY:
        return
    paper = Config.paper()
    yield Variant("encoder propagation, the paper's key steps", paper), None
    key_steps = paper.key_steps_of(case.steps)
    assert key_steps is not None
    auto = Config(recompute=DECODER, work=len(key_steps) / case.steps)
    yield Variant("encoder propagation, as many key steps from the schedule, damped forecast", auto), None
    if case.model == "miniature":
        if case.sampler in PLANNED:
            plan = Plan.load(PLANS / PLANNED[case.sampler])
            for share in SHARES:
                yield Variant("plan", plan.config(work=share)), share
        if find_spec("DeepCache") is not None:
            for interval in (2, 3):
                yield Variant(f"DeepCache, every {interval} steps", patch=deep_cache(interval)), None


def cases(models: Sequence[str]) -> list[Case]:
    return [
        Case(model, sampler, steps, guidance)
        for model in models
        for guidance in GUIDANCE[model]
        for sampler, steps in (SAMPLERS | NOISY).items()
    ]


def measure(models: Sequence[str], images: int, records: Path) -> None:
    """Measures the chunks that `records` does not hold yet, and appends them."""
    known = {chunk.key for chunk in read(records)}
    loaded = {name: Model(name, images) for name in models}
    asked = [
        (first, case, variant, share)
        for first in range(0, images, CHUNK)
        for others in (False, True)
        for case in cases(models)
        for variant, share in methods(case)
        if (variant.name not in (STOCK, DEFAULT, FEWER)) == others
    ]
    for first, case, variant, share in asked:
        if (case, variant.name, share, first) in known:
            continue
        variant = replace(variant, steps=variant.steps or case.steps, sampler=case.sampler)
        chunk = loaded[case.model].measure(case, variant, share, first)
        with records.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(chunk)) + "\n")
        print(case, variant.name, share, first, round(float(np.median(chunk.stock)), 1), flush=True)


def read(records: Path) -> list[Chunk]:
    if not records.is_file():
        return []
    lines = map(json.loads, records.read_text(encoding="utf-8").splitlines())
    return [Chunk(**values | {"case": Case(**values["case"])}) for values in lines]


@dataclass(frozen=True)
class Row:
    """Medians over all images of a method, in dB; `gain` is relative to fewer steps at the same share."""

    case: Case
    method: str
    share: float | None
    work: float
    images: int
    stock: float
    converged: float
    gain: float | None = None


def rows(chunks: Sequence[Chunk]) -> list[Row]:
    by_method = defaultdict(list)
    for chunk in sorted(chunks, key=lambda chunk: chunk.first):
        by_method[chunk.case, chunk.method, chunk.share].append(chunk)
    made = {}
    for (case, method, share), same in by_method.items():
        stock = [value for chunk in same for value in chunk.stock]
        converged = [value for chunk in same for value in chunk.converged]
        medians = (round(float(np.median(values)), 2) for values in (stock, converged))
        made[case, method, share] = Row(case, method, share, same[0].work, len(stock), *medians)
    return [
        row if fewer is None or method == FEWER else replace(row, gain=round(row.stock - fewer.stock, 2))
        for (case, method, share), row in made.items()
        for fewer in [made.get((case, FEWER, share))]
    ]


def markdown(made: Sequence[Row]) -> str:
    by_key = {(row.case, row.method, row.share): row for row in made}
    defaults = [row for row in made if row.method == DEFAULT and row.gain is not None]
    usual, noisy = ([row for row in defaults if row.case.sampler in known] for known in (SAMPLERS, NOISY))

    def to_stock(row: Row) -> tuple[str, ...]:
        fewer = by_key[row.case, FEWER, row.share]
        figures = f"{row.stock:.1f}", f"{fewer.stock:.1f}", f"{row.gain:+.1f}"
        return (*_spell(row.case), f"{row.share:g}", f"{row.images}", *figures)

    def to_converged(row: Row) -> Iterator[str]:
        compared = row, by_key[row.case, FEWER, row.share], by_key[row.case, STOCK, None]
        return (f"{each.converged:.1f}" for each in compared)

    names = ("model", "sampler", "guidance")
    head = (*names, "share", "images", "default", "fewer steps", "gain")
    others = [
        (*_spell(row.case), _name(row), f"{row.work:.3f}", f"{row.stock:.1f}", f"{row.converged:.1f}")
        for sampler in SAMPLERS
        for row in made
        if (row.case.sampler, row.case.guidance) == (sampler, USUAL) and row.method != STOCK
    ]
    return f"""\
# The default compared with fewer steps at the same work

Written by `make default`. Medians over the images of a row, PSNR in dB. *Share* is key steps / steps; \
the baseline has that many steps. The first three figures after \
the number of images are relative to the stock images of the same sampler with all its \
steps, the last three to those of {CONVERGED.sampler} with {CONVERGED.steps} steps. The forecast was fitted to the \
miniature and the digits, and to nothing of the emoji. Torch {torch.__version__}, diffusers {diffusers.__version__}, \
CPU, fp32.

{summary(usual)}

{markdown_table((*head, "default", "fewer steps", "stock"), *((*to_stock(row), *to_converged(row)) for row in usual))}

## Samplers that draw noise at each step

Fewer steps draw other noise, which makes other images.

{markdown_table(head, *map(to_stock, noisy))}

## Other methods, at guidance {USUAL:g}

*Work* is the UNet's FLOPs as a share of stock's.

{markdown_table((*names, "method", "work", "to stock", "to converged"), *others)}
"""


def summary(defaults: Sequence[Row]) -> str:
    """Formats the gains by model and share as a table."""
    lines = [("model", "share", "rows", "least gain", "median gain", "rows below fewer steps")]
    for model in GUIDANCE:
        for share in (FEWEST, *SHARES):
            gains = [row.gain or 0.0 for row in defaults if (row.case.model, row.share) == (model, share)]
            if gains:
                spread = f"{min(gains):+.1f}", f"{np.median(gains):+.1f}"
                lines.append((model, f"{share:g}", f"{len(gains)}", *spread, f"{sum(gain < 0 for gain in gains)}"))
    return markdown_table(*lines)


def _spell(case: Case) -> tuple[str, str, str]:
    sampler = case.sampler.removesuffix("Scheduler").removesuffix("Discrete").removesuffix("Multistep")
    return case.model, f"{sampler}, {case.steps}", f"{case.guidance:g}"


def _name(row: Row) -> str:
    return row.method if row.share is None else f"{row.method}, {row.share:g}"


def main() -> None:
    folder = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96, help="images per row (default: %(default)s)")
    parser.add_argument("--models", nargs="*", choices=list(GUIDANCE), default=list(GUIDANCE))
    parser.add_argument("--records", type=Path, default=folder.parent / "build" / "default.jsonl")
    arguments = parser.parse_args()
    if not 1 <= arguments.images <= (most := len(evaluation_scenes())):
        parser.error(f"--images {arguments.images}: expected 1 to {most}")
    arguments.records.parent.mkdir(parents=True, exist_ok=True)
    measure(arguments.models, arguments.images, arguments.records)
    made = rows(read(arguments.records))
    results = folder / "results"
    (results / "default.md").write_text(markdown(made), encoding="utf-8")
    values = [fields.pop("case") | fields for fields in map(asdict, made)]
    text = ",\n".join(map(json.dumps, values))
    (results / "default.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
