"""Variants of a pipeline, which make the same images in different ways."""

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
"""Classes and configurations of diffusers' schedulers, by the names of Table 1 and other common names."""


@dataclass(frozen=True)
class Patch:
    """A modification of a stock pipeline, for example by another library.

    Attributes:
        name: display name.
        apply: modifies a pipeline in place.
        package: optional package that `apply` imports; None if it imports none.
    """

    name: str
    apply: Callable[[Any], None]
    package: str | None = None


def merge_tokens(pipe: Any, **options: Any) -> None:
    """Merges half of the tokens with ToMe, without randomness, which a graph cannot repeat."""
    import tomesd  # type: ignore[import-untyped]

    tomesd.apply_patch(pipe, ratio=0.5, use_rand=False, **options)


TOME = Patch("ToMe", merge_tokens, "tomesd")


@dataclass(frozen=True)
class Variant:
    """A way to make images with a pipeline.

    Attributes:
        name: display name.
        config: configuration to optimize the pipeline with; None for a stock pipeline.
        steps: sampling steps, if fewer than those of the reference.
        sampler: one of `SAMPLERS`, or a scheduler class of diffusers; None for the pipeline's own scheduler.
        patch: modification to apply before optimizing.
        full_steps: sampling steps of the reference; None for the common number of steps.
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
        """Makes a pipeline of this variant with the weights of `pipe`, which is not changed."""
        variant = clone(pipe)
        if self.sampler is not None:
            variant.scheduler = scheduler_of(pipe, self.sampler)
        if self.patch is not None:
            self.patch.apply(variant)
        return variant if self.config is None else optimize(variant, self.config)

    def reference(self) -> Variant:
        """Returns the reference: the stock pipeline with the same sampler and patch."""
        return replace(self, name=self.named("stock"), config=None, steps=None)

    def baseline(self, steps: int) -> Variant:
        """Returns the fewer-steps baseline: the reference with `steps` steps."""
        return replace(self, name=f"{self.named('stock')}, {steps} steps", config=None, steps=steps)

    def named(self, name: str) -> str:
        """Appends sampler and patch to `name`."""
        sampler = f"{name}, {self.sampler}" if self.sampler else name
        return f"{sampler} + {self.patch.name}" if self.patch else sampler


def scheduler_of(pipe: Any, sampler: str | None) -> Any:
    """Makes a scheduler for `pipe`.

    Args:
        pipe: pipeline whose scheduler's configuration is used.
        sampler: one of `SAMPLERS`, case-insensitive; another scheduler class of diffusers; or None for the own class.

    Raises:
        ValueError: the sampler is unknown.
    """
    import diffusers

    known = {name.lower(): scheduler for name, scheduler in SAMPLERS.items()}
    kind, options = known.get((sampler or "").lower(), (sampler or type(pipe.scheduler).__name__, {}))
    if not hasattr(diffusers, kind):
        raise ValueError(f"sampler {kind!r}: expected one of {', '.join(SAMPLERS)}, or a scheduler class of diffusers")
    return getattr(diffusers, kind).from_config(pipe.scheduler.config, **options)


def fewer_steps(share: float, steps: int) -> int:
    """Returns the fewest of `steps` steps of the stock pipeline that take at least `share` of its work."""
    return math.ceil(share * steps - 1e-9)  # rounding of a quotient must not add a step
