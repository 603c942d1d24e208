"""The variants that `make bench` times against the stock pipeline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.settings import Setting
from fdcompile import PARTIAL_ENCODER, Config, Plan, deep_feature_caching
from fdcompile.key_steps import FEWEST_KEY_STEPS
from fdcompile.measure.variant import Patch, Variant, merge_tokens
from fdcompile.miniature import PLANS
from fdcompile.passes import OPTIONAL_PASSES

STOCK = "stock, eager"

COUNTED_AS = {
    "stock, torch.compile": STOCK,
    "fdcompile, inductor": "fdcompile, eager",
    "fdcompile, inductor, sequential": "fdcompile, eager, sequential",
}
"""For each compiled variant the uncompiled one whose FLOPs it takes over; compiled code cannot be counted."""

PLANNED_SHARES = (0.2, 0.33, 0.5)
"""Largest shares of the stock FLOPs for the rows with the miniature's plan."""


def candidates(setting: Setting) -> list[Variant]:
    """Returns the rows of a setting's table.

    Rows have the steps and key steps of `setting` unless they say otherwise. The first one is stock itself: the
    distance of its ratio from 1 is the uncertainty of all ratios.
    """
    steps, levels = setting.steps, len(setting.unet["block_out_channels"])
    eager = Config(key_steps=setting.key_steps, backend="eager")
    inductor = replace(eager, backend="inductor")
    rows = [Variant(STOCK)]
    if setting.compiled:
        rows.append(Variant("stock, torch.compile", patch=Patch("torch.compile", compile_unet)))
    if steps > FEWEST_KEY_STEPS:
        rows.append(Variant("fdcompile, default, eager", Config(backend="eager")))
    rows += [
        Variant("fdcompile, eager", eager),
        Variant("fdcompile, eager, sequential", replace(eager, max_parallel_steps=1)),
        *(
            Variant(f"fdcompile, eager, without {name}", replace(eager, disabled_passes=(name,)))
            for name in OPTIONAL_PASSES
        ),
        Variant("fdcompile, eager, partial encoder", replace(eager, recompute=PARTIAL_ENCODER)),
        Variant("fdcompile, eager, deep-feature caching", replace(eager, recompute=deep_feature_caching(levels))),
        Variant("fdcompile, eager, linear forecast", replace(eager, forecast="linear")),
    ]
    if setting.trained:
        plan = Plan.load(PLANS / f"ddim-{steps}.json")
        rows += [
            Variant(f"fdcompile, eager, planned at {share}", replace(plan.config(work=share), backend="eager"))
            for share in PLANNED_SHARES
        ]
    if setting.compiled:
        rows += [
            Variant("fdcompile, inductor", inductor),
            Variant("fdcompile, inductor, sequential", replace(inductor, max_parallel_steps=1)),
        ]
    return [
        *rows,
        *(Variant(f"DeepCache, N = {n}", patch=deep_cache(n)) for n in (2, 3, 5)),
        Variant("ToMe, ratio 0.5", patch=TOME_FINEST),
        Variant("fdcompile, eager, with ToMe", eager, patch=TOME_FINEST),
        *(Variant(f"stock, {fewer} steps", steps=fewer) for fewer in (round(steps / 2), round(steps / 3))),
    ]


def compile_unet(pipe: Any) -> None:
    """Compiles as fdcompile's inductor backend does: with static shapes, and on CUDA with CUDA graphs."""
    mode = "reduce-overhead" if pipe.unet.device.type == "cuda" else None
    pipe.unet.compile(fullgraph=True, dynamic=False, mode=mode)


def deep_cache(interval: int) -> Patch:
    """Returns a patch that enables DeepCache with a uniform interval."""

    def patch(pipe: Any) -> None:
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe)
        helper.set_params(cache_interval=interval)
        helper.enable()

    return Patch(f"DeepCache, N = {interval}", patch, "DeepCache")


def _merge_tokens(pipe: Any) -> None:
    """Merges tokens at the finest level that has transformers; tomesd's default is level 0, where SDXL has none."""
    level = next(n for n, block in enumerate(pipe.unet.config.down_block_types) if "CrossAttn" in block)
    merge_tokens(pipe, max_downsample=2**level)


TOME_FINEST = Patch("ToMe, finest", _merge_tokens, "tomesd")
