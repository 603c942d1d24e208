"""Variants of a pipeline: ways to make the same pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fdcompile.api import optimize
from fdcompile.config import Config
from fdcompile.pipeline.clone import clone

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "DPM-Solver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "DPM": ("DPMSolverMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
}
"""Schedulers of diffusers, and what they are configured with, by the names of Table 1 and others that are usual."""


@dataclass(frozen=True)
class Patch:
    """A change of a stock pipeline, by another library for instance.

    Attributes:
        name: for people.
        apply: changes a pipeline in place.
        package: what `apply` imports; None: nothing optional.
    """

    name: str
    apply: Callable[[Any], None]
    package: str | None = None


def merge_tokens(pipe: Any, **options: Any) -> None:
    """ToMe with half of the tokens merged, and without randomness, which no graph can repeat."""
    import tomesd  # type: ignore[import-untyped]

    tomesd.apply_patch(pipe, ratio=0.5, use_rand=False, **options)


TOME = Patch("ToMe", merge_tokens, "tomesd")


@dataclass(frozen=True)
class Variant:
    """A way to make pictures with a pipeline.

    Attributes:
        name: for people.
        config: what the pipeline is optimized with; None: it is stock.
        steps: sampling steps, if they are fewer than those of the stock pipeline that this is compared with.
        sampler: one of `SAMPLERS`; None: the pipeline's own scheduler.
        patch: applied before it is optimized.
        full_steps: of the stock pipeline that this is compared with; None: as many as all others.
    """

    name: str
    config: Config | None = None
    steps: int | None = None
    sampler: str | None = None
    patch: Patch | None = None
    full_steps: int | None = None

    def __str__(self) -> str:
        return self.name

    def of(self, pipe: Any) -> Any:
        """A new pipeline that makes pictures this way, with the weights of `pipe`, which is not changed."""
        variant = clone(pipe)
        if self.sampler is not None:
            variant.scheduler = scheduler_of(pipe, self.sampler)
        if self.patch is not None:
            self.patch.apply(variant)
        return variant if self.config is None else optimize(variant, self.config)

    def reference(self) -> Variant:
        """The stock pipeline that this is compared with, with the same sampler and patch."""
        return replace(self, name=self.named("stock"), config=None, steps=None)

    def baseline(self, steps: int) -> Variant:
        """The stock pipeline with `steps` steps of the same sampler: the fewer-steps baseline."""
        return replace(self, name=f"{self.named('stock')}, {steps} steps", config=None, steps=steps)

    def named(self, name: str) -> str:
        """`name` with the sampler and the patch."""
        sampler = f"{name}, {self.sampler}" if self.sampler else name
        return f"{sampler} + {self.patch.name}" if self.patch else sampler


def scheduler_of(pipe: Any, sampler: str | None) -> Any:
    """A new scheduler for `pipe`: one of `SAMPLERS`, in any case, another class of diffusers, or None for its own.

    Raises:
        ValueError: there is no such sampler.
    """
    import diffusers

    known = {name.lower(): scheduler for name, scheduler in SAMPLERS.items()}
    kind, options = known.get((sampler or "").lower(), (sampler or type(pipe.scheduler).__name__, {}))
    if not hasattr(diffusers, kind):
        raise ValueError(f"sampler {kind!r}: expected one of {', '.join(SAMPLERS)}, or a scheduler class of diffusers")
    return getattr(diffusers, kind).from_config(pipe.scheduler.config, **options)


def fewer_steps(share: float, steps: int) -> int:
    """Number of steps of the stock pipeline, out of `steps`, that make up at least `share` of its work."""
    return math.ceil(share * steps - 1e-9)  # a share is a quotient: one that is exact must not buy a step more
