"""What a user may choose, validated before any work starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fdcompile.backends import check_backend
from fdcompile.backends.protocols import Backend
from fdcompile.key_steps import Choice, check_key_steps
from fdcompile.passes import OPTIONAL_PASSES, PASSES, Pass

DECODER = ("up_blocks", "conv_norm_out", "conv_act", "conv_out")
"""Encoder propagation (paper, Sec. 3.3): the decoder is fresh at every step, everything before it is reused."""

PARTIAL_ENCODER = ("conv_in", "down_blocks.0", *DECODER)
"""Partial encoder propagation: the shallow encoder is fresh too, the deep encoder and bottleneck are reused."""


def deep_feature_caching(num_blocks: int) -> tuple[str, ...]:
    """The cut of deep-feature caching (DeepCache): of a UNet of `num_blocks` levels only the outermost is fresh."""
    return ("conv_in", "down_blocks.0", f"up_blocks.{num_blocks - 1}", "conv_norm_out", "conv_act", "conv_out")


@dataclass(frozen=True)
class NoiseInjection:
    """Prior noise injection (paper, Sec. 3.3): ``z_t + alpha * z_T`` before the scheduler's step.

    Attributes:
        alpha: scale of the initial latent ``z_T``.
        tau: applied at steps whose timestep is below this fraction of the training timesteps.

    Raises:
        ValueError: `alpha` is not finite, or `tau` is outside [0, 1].
    """

    alpha: float = 0.003
    tau: float = 0.5

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha={self.alpha}: expected a finite number such as the paper's 0.003")
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"tau={self.tau}: expected a fraction of the training timesteps between 0 and 1")


@dataclass(frozen=True)
class Config:
    """How `optimize` runs a UNet.

    Attributes:
        key_steps: at which steps the encoder runs: ``"paper"``, ``"all"``, an int (uniform stride), a sequence of
            step indices that contains 0, or a callable from the number of steps to such a sequence. Steps are counted
            from the first one that a run executes (img2img starts late in the schedule). ``"paper"`` is the paper's
            set for Stable Diffusion, ``"paper-personalized"`` its set for DreamBooth and Custom Diffusion, and
            ``"paper-if-1"``, ``"paper-if-2"`` and ``"paper-if-3"`` those for the stages of DeepFloyd-IF.
        fresh: the cut: paths of the modules computed at every step. The default is encoder propagation; ``()``
            reuses the whole output. Whether a group can be decoded in parallel follows from it.
        max_parallel_steps: upper bound on the steps decoded in one batch; 1 decodes them one by one. ``"auto"`` is the
            most that fits into `memory_budget`.
        memory_budget: how much more memory ``"auto"`` may use than the stock UNet needs for its weights and its largest
            set of live tensors, as a fraction of that.
        noise_injection: None, a `NoiseInjection`, or ``"auto"``: the paper's values for latent text-to-image runs
            that have non-key steps. Off by default, because it moves pictures away from the stock pipeline's.
        backend: ``"auto"`` (inductor on CUDA, eager on a CPU), ``"eager"``, ``"inductor"`` or a backend object.
        disabled_passes: names of exact rewrites to leave out, of those in `OPTIONAL_PASSES`.

    Raises:
        ValueError, TypeError: a value is not one of the above; the message names it and what was expected.
    """

    key_steps: Choice = "paper"
    fresh: tuple[str, ...] = DECODER
    max_parallel_steps: int | Literal["auto"] = "auto"
    memory_budget: float = 0.15
    noise_injection: NoiseInjection | Literal["auto"] | None = None
    backend: str | Backend = "auto"
    disabled_passes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_key_steps(self.key_steps)
        if isinstance(self.fresh, str) or not all(isinstance(path, str) and path for path in self.fresh):
            raise TypeError(f"fresh={self.fresh!r}: expected a tuple of module paths such as ('up_blocks', 'conv_out')")
        object.__setattr__(self, "fresh", tuple(self.fresh))
        if self.max_parallel_steps != "auto" and type(self.max_parallel_steps) is not int:
            raise TypeError(f"max_parallel_steps={self.max_parallel_steps!r}: expected an int or 'auto'")
        if self.max_parallel_steps != "auto" and self.max_parallel_steps < 1:
            raise ValueError(f"max_parallel_steps={self.max_parallel_steps}: expected at least 1 (1 is sequential)")
        if not (math.isfinite(self.memory_budget) and self.memory_budget >= 0):
            raise ValueError(f"memory_budget={self.memory_budget}: expected a fraction such as 0.15, 0 or more")
        if not (self.noise_injection in (None, "auto") or isinstance(self.noise_injection, NoiseInjection)):
            raise TypeError(f"noise_injection={self.noise_injection!r}: expected None, 'auto' or NoiseInjection(...)")
        check_backend(self.backend)
        object.__setattr__(self, "disabled_passes", tuple(self.disabled_passes))
        if unknown := set(self.disabled_passes) - set(OPTIONAL_PASSES):
            raise ValueError(f"disabled_passes: {sorted(unknown)}: expected names out of {list(OPTIONAL_PASSES)}")

    @property
    def program(self) -> tuple[object, ...]:
        """The part that the staged program and its lowered stages follow from; the rest only steers their use."""
        return self.fresh, self.disabled_passes, self.backend

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The pass table without what is disabled."""
        return tuple(step for step in PASSES if step.name not in self.disabled_passes)
