"""The ways to make a picture that `make bench` times against the stock pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.settings import Setting
from fdcompile import PARTIAL_ENCODER, Config, Plan, deep_feature_caching
from fdcompile.miniature import PLANS
from fdcompile.passes import OPTIONAL_PASSES

STOCK = "stock, eager"

PLANNED_SHARES = (0.2, 0.33, 0.5)
"""Of the stock FLOPs, that the rows with the miniature's plan may take."""


@dataclass(frozen=True)
class Candidate:
    """A way to make a picture; without `config` and `patch` it is the stock pipeline.

    Attributes:
        name: as in the table.
        steps: of the sampler.
        config: what `fdcompile.optimize` is given.
        patch: changes a stock pipeline in place, before that.
        package: what `patch` imports; the candidate is skipped where it is not installed.
        counted_as: name of the candidate that does the same operations uncompiled: FLOPs inside compiled code are not
            seen.
    """

    name: str
    steps: int
    config: Config | None = None
    patch: Callable[[Any], None] | None = None
    package: str | None = None
    counted_as: str | None = None

    def __str__(self) -> str:
        return self.name


def candidates(setting: Setting) -> list[Candidate]:
    """The rows of a setting's table.

    The first one is stock itself: how far its ratio is from 1 is how far any ratio may be off.
    """
    steps, levels = setting.steps, len(setting.unet["block_out_channels"])
    eager = Config(key_steps=setting.key_steps, backend="eager")
    inductor = replace(eager, backend="inductor")
    rows = [Candidate(STOCK, steps)]
    if setting.compiled:
        rows.append(Candidate("stock, torch.compile", steps, patch=compile_unet, counted_as=STOCK))
    rows += [
        Candidate("fdcompile, eager", steps, eager),
        Candidate("fdcompile, eager, sequential", steps, replace(eager, max_parallel_steps=1)),
    ]
    rows += [
        Candidate(f"fdcompile, eager, without {name}", steps, replace(eager, disabled_passes=(name,)))
        for name in OPTIONAL_PASSES
    ]
    rows += [
        Candidate("fdcompile, eager, partial encoder", steps, replace(eager, recompute=PARTIAL_ENCODER)),
        Candidate(
            "fdcompile, eager, deep-feature caching", steps, replace(eager, recompute=deep_feature_caching(levels))
        ),
    ]
    rows.append(Candidate("fdcompile, eager, linear forecast", steps, replace(eager, forecast="linear")))
    if setting.trained:
        plan = Plan.load(PLANS / f"ddim-{steps}.json")
        rows += [
            Candidate(f"fdcompile, eager, planned at {share}", steps, replace(plan.config(work=share), backend="eager"))
            for share in PLANNED_SHARES
        ]
    if setting.compiled:
        one_by_one = replace(inductor, max_parallel_steps=1)
        rows += [
            Candidate("fdcompile, inductor", steps, inductor, counted_as="fdcompile, eager"),
            Candidate("fdcompile, inductor, sequential", steps, one_by_one, counted_as="fdcompile, eager, sequential"),
        ]
    rows += [Candidate(f"DeepCache, N = {n}", steps, patch=deep_cache(n), package="DeepCache") for n in (2, 3, 5)]
    rows += [
        Candidate("ToMe, ratio 0.5", steps, patch=_merge_tokens, package="tomesd"),
        Candidate("fdcompile, eager, with ToMe", steps, eager, patch=_merge_tokens, package="tomesd"),
    ]
    rows += [Candidate(f"stock, {fewer} steps", fewer) for fewer in (round(steps / 2), round(steps / 3))]
    return rows


def compile_unet(pipe: Any) -> None:
    """As fdcompile's own inductor backend does it: static shapes, and on CUDA with CUDA graphs."""
    mode = "reduce-overhead" if pipe.unet.device.type == "cuda" else None
    pipe.unet.compile(fullgraph=True, dynamic=False, mode=mode)


def deep_cache(interval: int) -> Callable[[Any], None]:
    """Switches on DeepCache, which has uniform intervals only."""

    def patch(pipe: Any) -> None:
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe)
        helper.set_params(cache_interval=interval)
        helper.enable()

    return patch


def _merge_tokens(pipe: Any) -> None:
    """ToMe at the finest level that has transformers; its own default is level 0, where SDXL has none.

    Without its random choice of tokens, which no graph can repeat.
    """
    import tomesd

    level = next(n for n, block in enumerate(pipe.unet.config.down_block_types) if "CrossAttn" in block)
    tomesd.apply_patch(pipe, ratio=0.5, max_downsample=2**level, use_rand=False)
