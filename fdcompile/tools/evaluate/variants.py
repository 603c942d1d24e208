"""Variants by name, and the rows of the paper's tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import fdcompile
from fdcompile.config import PARTIAL_ENCODER, Config, NoiseInjection, deep_feature_caching
from fdcompile.key_steps import PAPER, Preset
from fdcompile.measure.variant import TOME, Variant
from fdcompile.pipeline.check import number_of_levels

TABLE_3: dict[str, tuple[int, ...]] = {
    "uniform-i": tuple(range(0, 50, 2)),
    "uniform-ii": tuple(range(0, 50, 6)),
    "uniform-iii": tuple(range(0, 50, 12)),
    "non-uniform-i": (0, 10, 11, 12, 20, 25, 30, 35, 45),
    "non-uniform-ii": (0, 20, 25, 30, 35, 36, 45, 46, 47),
    "non-uniform-iii": (0, 9, 13, 15, 28, 29, 32, 36, 45),
    "non-uniform-iv": PAPER["paper"][50],
}
"""The sets of key steps of Table 3, of 50 steps, as indices counted from the first step."""

Table = Literal["table-1", "table-2", "table-3"]

_IF_STAGES: dict[str, tuple[Preset, int]] = {
    "IFPipeline": ("paper-if-1", 100),
    "IFSuperResolutionPipeline": ("paper-if-2", 50),
}
"""Key steps and steps of the stages of DeepFloyd-IF that diffusers has (Supp. C.1)."""

VARIANTS: dict[str, Callable[[int], Config]] = {
    "paper": lambda levels: Config.paper(),
    "one-by-one": lambda levels: Config.paper(max_parallel_steps=1),
    "noise-injection": lambda levels: Config.paper(noise_injection=NoiseInjection()),
    "partial-encoder": lambda levels: Config.paper(recompute=PARTIAL_ENCODER),
    "deep-feature-caching": lambda levels: Config.paper(recompute=deep_feature_caching(levels)),
    "output-reuse": lambda levels: Config.paper(recompute=()),
    **{name: lambda levels, steps=steps: Config(key_steps=steps) for name, steps in TABLE_3.items()},  # type: ignore[misc]
}
"""Configurations by name, each a function of the number of levels of the UNet."""


def parse_variant(text: str, pipe: Any, work: float) -> Variant:
    """Parses a variant: a name, a number of steps, or a file with a plan or a configuration.

    Args:
        text: the variant.
        pipe: the pipeline that it is for; None to check `text` before there is one.
        work: largest share of stock's FLOPs for a plan.

    Raises:
        ValueError: `text` is none of these, or does not fit `pipe`.
        OSError: the file cannot be read.
    """
    if text in VARIANTS:
        return Variant(text, VARIANTS[text](number_of_levels(pipe)))
    if text.isdecimal() and int(text) > 0:
        return Variant("stock").baseline(int(text))
    if text.endswith(".json") and Path(text).is_file():
        return _of_file(Path(text), work)
    raise ValueError(
        f"{text!r}: expected a number of steps, a file with a plan or a configuration (.json), or one of "
        f"{', '.join(VARIANTS)}"
    )


def _of_file(path: Path, work: float) -> Variant:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a plan or a configuration")
    if "points" not in values:
        return Variant(path.stem, Config.from_dict(values))
    plan = fdcompile.Plan.load(path)
    return Variant(path.stem, plan.configured(plan.point(work=work)))


def paper_table(table: Table, pipe: Any) -> list[Variant]:
    """Returns the rows of a table of the paper for the class of `pipe`.

    Raises:
        ValueError: the table has no row for this class.
        ModuleNotFoundError: a row merges tokens, and tomesd is not installed.
    """
    kind = type(pipe).__name__
    if kind in _IF_STAGES:
        key_steps, steps = _IF_STAGES[kind]
        rows = {"table-1": [Variant("paper", Config(key_steps=key_steps), sampler="DDPM", full_steps=steps)]}
    elif kind == "StableDiffusionPipeline":
        paper = Variant("paper", Config.paper(), sampler="DDIM", full_steps=50)
        rows = {
            "table-1": [
                paper,
                replace(paper, sampler="DPM-Solver", full_steps=20),
                replace(paper, sampler="DPM-Solver++", full_steps=20),
                replace(paper, patch=TOME),
            ],
            "table-2": [replace(paper, name="paper-personalized", config=Config(key_steps="paper-personalized"))],
            "table-3": [replace(paper, name=name, config=Config(key_steps=steps)) for name, steps in TABLE_3.items()],
        }
    elif kind in ("StableDiffusionControlNetPipeline", "TextToVideoSDPipeline", "TextToVideoZeroPipeline"):
        rows = {"table-2": [Variant("paper", Config.paper(), sampler="DDIM", full_steps=50)]}
    else:
        rows = {}
    if table not in rows:
        raise ValueError(f"{table} has no row for {kind}; of this kind are in {', '.join(rows) or 'none of them'}")
    variants = [replace(variant, name=variant.named(variant.name)) for variant in rows[table]]
    if any(variant.patch for variant in variants) and find_spec("tomesd") is None:
        raise ModuleNotFoundError("a row merges tokens, which tomesd does, and it is not installed: pip install tomesd")
    return variants
