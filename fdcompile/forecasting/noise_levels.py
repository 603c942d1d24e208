"""Noise levels of a scheduler, and the sensitivity of the result to the error of each step's prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Vector = NDArray[np.float64]

Read = Callable[[Tensor], Sequence[float]]
"""Function that reads the values of a one-dimensional tensor, which may be on a device."""

MOST_NOISE = 1e4
"""Bound on ``sigma / alpha`` and on its inverse; the first step of a schedule may have no signal at all."""

_STOCHASTIC = (
    *("Ancestral", "CMStochastic", "CogVideoXDPM", "CosineDPM", "DDPM", "KarrasVe", "LCM", "RePaint", "SASolver"),
    *("SDE", "Sde", "TCD", "UnCLIP"),
)
"""Parts of the class names of diffusers' schedulers that draw noise at each step."""

_REUSABLE = ("Ancestral", "DDPM")
"""Those among them that outputs are reused with.

Damping finds that nothing can be forecast and holds the outputs, which moves images far less than fewer steps do.
With SDE solvers of higher order it moves them as far (``docs/results.md``).
"""


@dataclass(frozen=True)
class NoiseLevels:
    """Noise levels of a schedule.

    Attributes:
        ratios: ``sigma / alpha`` at each step and after the last, shape ``[steps + 1]``.
        prediction_type: the quantity that the UNet predicts: ``"epsilon"``, ``"v_prediction"``, ``"sample"`` or
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
        """Weight of each step's prediction in the result of a first-order sampler, shape ``[steps]``.

        With ``r = sigma / alpha``, a first-order sampler integrates ``x / alpha`` along ``r``. An error of a predicted
        noise is multiplied by ``|r_next - r|``; an error of a predicted velocity by ``alpha`` times that, and an error
        of a predicted latent by ``1 / r`` times that. Two steps at one noise level, as in Heun's method, share the
        moves of both.
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
    """Returns the noise levels at ``scheduler.timesteps``; None if the scheduler does not expose them."""
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
    """Returns `NoiseLevels.sensitivity`, or ones for a scheduler that does not expose its noise levels."""
    levels = noise_levels(scheduler)
    return np.ones(len(scheduler.timesteps)) if levels is None else levels.sensitivity


def fresh_noise(scheduler: Any) -> bool:
    """Returns whether each step adds new noise, as ancestral samplers, SDE solvers and DDPM do.

    Decided by the class and the configuration of the scheduler. Noise that a call adds, such as by ``eta`` of DDIM, is
    not detected.
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    asked = str(config.get("algorithm_type", "")).startswith("sde") or config.get("stochastic_sampling", False)
    return asked or any(part in name for part in _STOCHASTIC)


def predictable_levels(scheduler: Any, steps: int, read: Read = Tensor.tolist) -> tuple[NoiseLevels | None, str | None]:
    """Returns the noise levels of a schedule of `steps` steps; or None and the reason why it cannot be forecast."""
    name = type(scheduler).__name__
    if fresh_noise(scheduler) and not any(part in name for part in _REUSABLE):
        return None, f"{name} adds fresh noise at each step, which no forecast can know"
    levels = noise_levels(scheduler, read)
    if levels is None or len(levels.log_snr) != steps:
        return None, f"{name} does not expose its noise levels"
    return levels, None


def _interpolated(alphas_cumprod: Vector, timesteps: Vector) -> Vector:
    signal = np.interp(timesteps, np.arange(len(alphas_cumprod)), alphas_cumprod)
    ratios: Vector = np.append(np.sqrt((1 - signal) / np.maximum(signal, MOST_NOISE**-2)), 0.0)
    return ratios
