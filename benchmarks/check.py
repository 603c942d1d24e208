"""Compares exact figures of the compiled programs of three UNets with `baseline.json`.

    python -m benchmarks.check            compare; exit status 1 and a table of the differences
    python -m benchmarks.check --update   write a new baseline

The figures do not depend on the machine: the UNets are captured on the meta device, without weights. FLOPs are the
UNet's, for one image with guidance. The figures and the fidelity of runs are checked by `fdcompile gate`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from benchmarks.models import (
    MINIATURE,
    MINIATURE_TOKENS,
    SD15,
    SDXL,
    SIZE_CONDITIONS,
    TOKENS,
    pooled_width,
    random_unet,
)
from fdcompile import Config
from fdcompile.capture.call import UNetCall
from fdcompile.capture.export import capture
from fdcompile.graph.flops import count_flops, shapes
from fdcompile.graph.program import StagedProgram
from fdcompile.key_steps import resolve_key_steps
from fdcompile.measure.markdown import markdown_table
from fdcompile.passes import OPTIONAL_PASSES, enabled_passes, run_passes
from fdcompile.tools.gate.baseline import compare_exact, difference_table

BASELINE = Path(__file__).with_name("baseline.json")
SCHEDULES = (50, 20)
LATENTS = 2
"""Latents in a UNet call for one image: with guidance, one with and one without the prompt."""

Figures = dict[str, int]


def all_figures(config: Config) -> Figures:
    return {
        **unet_figures("SD 1.5, 64x64", meta_unet(SD15), TOKENS, config),
        **unet_figures("SDXL, 128x128", meta_unet(SDXL), TOKENS, config),
        **miniature_figures(config),
    }


def miniature_figures(config: Config) -> Figures:
    return unet_figures("miniature", meta_unet(MINIATURE), MINIATURE_TOKENS, config)


def meta_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return random_unet(config)


def unet_figures(model: str, unet: UNet2DConditionModel, tokens: int, config: Config) -> Figures:
    """Counts operations of each stage and FLOPs of runs; for the first schedule also without each optional pass."""
    call = example_call(unet, tokens)
    captured = capture(unet, call)
    stock = count_flops(captured, shapes(call.tensors))
    program = run_passes(captured, config.recompute, enabled_passes(config.disabled_passes))
    figures: Figures = {}
    for name, stage in program.stages.items():
        figures |= {f"{model} / {name} / {op}": count for op, count in stage.op_counts.items()}
    for steps in SCHEDULES:
        figures[f"{model} / {steps} steps / FLOPs, stock"] = steps * stock
        flops = run_flops(program, config, steps)
        figures[f"{model} / {steps} steps / FLOPs"] = sum(flops.values())
        figures |= {f"{model} / {steps} steps / FLOPs, {name}": count for name, count in flops.items()}
    for name in OPTIONAL_PASSES:
        variant = replace(config, disabled_passes=(*config.disabled_passes, name))
        program = run_passes(captured, variant.recompute, enabled_passes(variant.disabled_passes))
        total = sum(run_flops(program, variant, SCHEDULES[0]).values())
        figures[f"{model} / {SCHEDULES[0]} steps / FLOPs, without {name}"] = total
    return figures


def run_flops(program: StagedProgram, config: Config, steps: int) -> dict[str, int]:
    """FLOPs by stage of a run of `steps` steps, including the values of the schedule."""
    runs = {"prompt": 1, "encoder": len(resolve_key_steps(config.key_steps, steps))}
    return {name: runs.get(name, steps) * stage.flops(LATENTS) for name, stage in program.stages.items()}


def example_call(unet: UNet2DConditionModel, tokens: int) -> UNetCall:
    """Makes a call of `unet` on its device, with latents of its sample size."""
    config = unet.config
    with torch.device(unet.device):
        latents = torch.empty(LATENTS, config.in_channels, config.sample_size, config.sample_size)
        timestep = torch.empty((), dtype=torch.int64)
        arguments: dict[str, Any] = {"encoder_hidden_states": torch.empty(LATENTS, tokens, config.cross_attention_dim)}
        if (pooled := pooled_width(config)) is not None:
            added = {"text_embeds": torch.empty(LATENTS, pooled), "time_ids": torch.empty(LATENTS, SIZE_CONDITIONS)}
            arguments["added_cond_kwargs"] = added
    return UNetCall.parse(inspect.signature(unet.forward), (latents, timestep), arguments)


def flops_table(figures: Figures) -> str:
    """Formats the FLOPs of each model and schedule as shares of stock's."""
    labels = ["FLOPs", *(f"FLOPs, without {name}" for name in OPTIONAL_PASSES)]
    rows = []
    for figure, stock in figures.items():
        if figure.endswith("/ FLOPs, stock"):
            run = figure.removesuffix("FLOPs, stock")
            shares = (f"{figures[run + label] / stock:.4f}" if run + label in figures else "" for label in labels)
            rows.append((run.removesuffix(" / "), f"{stock / 1e9:.1f}", *shares))
    return markdown_table(("model", "stock, GFLOP per image", *labels), *rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write a new baseline")
    arguments = parser.parse_args(argv)
    config = Config.paper()
    figures = all_figures(config)
    print(flops_table(figures), end="\n\n")
    if arguments.update:
        BASELINE.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        print(f"{len(figures)} figures written to {BASELINE}")
        return 0
    wrong = difference_table(compare_exact(json.loads(BASELINE.read_text(encoding="utf-8")), figures))
    if wrong:
        print(wrong, end="\n\n")
        print("If this is meant: .venv/bin/python -m benchmarks.check --update, and commit the file.")
    else:
        print(f"All {len(figures)} exact figures are those of the baseline.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
