"""What a scheduler says of its noise, and how much an error of one step's prediction moves the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Vector = NDArray[np.float64]

Read = Callable[[Tensor], Sequence[float]]
"""Reads the values of a tensor of one axis, which may be on a device."""

MOST_NOISE = 1e4
"""Bound on ``sigma / alpha`` and on its inverse: the first step of a schedule may have no signal at all."""

_STOCHASTIC = (
    *("Ancestral", "CMStochastic", "CogVideoXDPM", "CosineDPM", "DDPM", "KarrasVe", "LCM", "RePaint", "SASolver"),
    *("SDE", "Sde", "TCD", "UnCLIP"),
)
"""In the names of diffusers' schedulers that draw noise at each step."""


@dataclass(frozen=True)
class NoiseLevels:
    """The noise of a schedule.

    Attributes:
        ratios: ``sigma / alpha`` at each step and after the last, shape ``[steps + 1]``.
        prediction_type: what the UNet predicts: ``"epsilon"``, ``"v_prediction"``, ``"sample"`` or
            ``"flow_prediction"``.
    """

    ratios: Vector
    prediction_type: str

    @property
    def log_snr(self) -> Vector:
        """Half the logarithm of the signal-to-noise ratio, ``log(alpha / sigma)``, shape ``[steps]``."""
        ratios: Vector = -np.log(np.clip(self.ratios[:-1], 1 / MOST_NOISE, MOST_NOISE))
        return ratios

    @property
    def sensitivity(self) -> Vector:
        """The weight of each step's prediction in what a first-order sampler makes of them, shape ``[steps]``.

        With ``r = sigma / alpha`` such a sampler walks ``x / alpha`` along ``r``: an error of the predicted noise moves
        the rest of the run by ``|r_next - r|`` times itself. One of a predicted velocity counts ``alpha`` times that,
        one of a predicted latent ``1 / r`` times. Steps that evaluate one level twice, as Heun's do, share its moves.
        """
        ratios = np.minimum(self.ratios, MOST_NOISE)
        moved: Vector = np.abs(np.diff(ratios))
        ratio: Vector = ratios[:-1]
        if not moved.all():
            moved = (moved + np.append(moved[:1], moved[:-1])) / 2
        if self.prediction_type == "v_prediction":
            moved = moved / np.sqrt(1 + ratio**2)
        elif self.prediction_type == "flow_prediction":
            moved = moved / (1 + ratio)
        elif self.prediction_type == "sample":
            moved = moved / np.maximum(ratio, 1 / MOST_NOISE)
        return moved


def noise_levels(scheduler: Any, read: Read = Tensor.tolist) -> NoiseLevels | None:
    """The noise levels at ``scheduler.timesteps``; None if the scheduler does not say them."""
    config = getattr(scheduler, "config", {})
    flow = "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas", False)
    prediction_type = "flow_prediction" if flow else config.get("prediction_type", "epsilon")
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == len(scheduler.timesteps) + 1:
        ratios = np.array(read(sigmas) if isinstance(sigmas, Tensor) else sigmas, np.float64)
        if flow:
            ratios = ratios / np.maximum(1 - ratios, 1 / MOST_NOISE)
    elif isinstance(kept := getattr(scheduler, "alphas_cumprod", None), Tensor):
        ratios = _interpolated(np.array(read(kept)), np.array(read(scheduler.timesteps)))
    else:
        return None
    return NoiseLevels(ratios, prediction_type) if np.isfinite(ratios).all() and ratios[:-1].all() else None


def step_sensitivity(scheduler: Any) -> Vector:
    """See `NoiseLevels.sensitivity`; 1 everywhere for a scheduler that does not say its noise levels."""
    levels = noise_levels(scheduler)
    return np.ones(len(scheduler.timesteps)) if levels is None else levels.sensitivity


def fresh_noise(scheduler: Any) -> bool:
    """Whether each step adds noise that no earlier prediction knows of: ancestral samplers, SDE solvers, DDPM.

    It goes by the scheduler's class and configuration. What a call asks for, such as ``eta`` of DDIM, is not seen.
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    asked = str(config.get("algorithm_type", "")).startswith("sde") or config.get("stochastic_sampling", False)
    return asked or any(part in name for part in _STOCHASTIC)


def predictable_levels(scheduler: Any, steps: int, read: Read = Tensor.tolist) -> tuple[NoiseLevels | None, str | None]:
    """The noise levels of a schedule of `steps` steps, or why nothing can be forecast from them."""
    name = type(scheduler).__name__
    if fresh_noise(scheduler):
        return None, f"{name} adds fresh noise at each step, which no forecast can know"
    levels = noise_levels(scheduler, read)
    if levels is None or len(levels.log_snr) != steps:
        return None, f"{name} does not say its noise levels"
    return levels, None


def _interpolated(alphas_cumprod: Vector, timesteps: Vector) -> Vector:
    signal = np.interp(timesteps, np.arange(len(alphas_cumprod)), alphas_cumprod)
    ratios: Vector = np.append(np.sqrt((1 - signal) / np.maximum(signal, MOST_NOISE**-2)), 0.0)
    return ratios
