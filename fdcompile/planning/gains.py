"""How much an error of one step's prediction moves the picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def step_gains(scheduler: Any) -> Vector:
    """The weight of each step's prediction in what a first-order sampler makes of them, shape ``[steps]``.

    With ``r = sigma / alpha``, the noise of a latent against its signal, such a sampler walks ``x / alpha`` along
    ``r``: an error of the predicted noise moves the rest of the run by ``|r_next - r|`` times itself. One of a
    predicted velocity counts ``alpha`` times that, one of a predicted latent ``1 / r`` times. A scheduler that does not
    say its noise levels, or evaluates one twice as Heun's does, gets 1 everywhere.
    """
    noise = _noise_levels(scheduler)
    if noise is None:
        return np.ones(len(scheduler.timesteps))
    moved, level = np.abs(np.diff(noise)), noise[:-1]
    kind = getattr(scheduler.config, "prediction_type", "epsilon")
    if kind == "v_prediction":
        return moved / np.sqrt(1 + level**2)
    if kind == "sample":
        return moved / np.maximum(level, np.finfo(np.float64).tiny)
    return moved


def _noise_levels(scheduler: Any) -> Vector | None:
    """``sigma / alpha`` at each step and after the last, ``[steps + 1]``; None if it is not said, or does not move."""
    steps = len(scheduler.timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == steps + 1:
        noise = torch.as_tensor(sigmas).double().cpu().numpy()
    elif (kept := getattr(scheduler, "alphas_cumprod", None)) is not None:
        signal = kept.double().cpu().numpy()[scheduler.timesteps.cpu().long().numpy()]
        noise = np.append(np.sqrt((1 - signal) / np.maximum(signal, np.finfo(np.float64).tiny)), 0.0)
    else:
        return None
    return noise if np.isfinite(noise).all() and np.diff(noise).all() else None
