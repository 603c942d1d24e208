"""Closeness of runs to other runs of the same calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fdcompile.measure.calls import Output
from fdcompile.measure.metrics import Images, psnr, ssim

CLOSEST = 100.0
"""PSNR in dB assigned to equal images, whose PSNR is infinite."""


@dataclass(frozen=True)
class Fidelity:
    """Closeness of runs to the stock runs of the same calls, medians over the images.

    Attributes:
        psnr: PSNR in dB of the images, or of the latents if the pipeline returns no images; at most `CLOSEST`.
        latent_psnr: PSNR in dB of the latents; the peak is the range of the stock latents.
        ssim: structural similarity of the images; None without images.
        converged: like `psnr`, but to stock runs with many steps; None without such runs.
    """

    psnr: float
    latent_psnr: float
    ssim: float | None
    converged: float | None


def compute_fidelity(
    made: Sequence[Output], stock: Sequence[Output], converged: Sequence[Output] | None = None
) -> Fidelity:
    """Compares runs with the stock runs of the same calls, and with stock runs of many steps if given."""
    images = _images(made)
    return Fidelity(
        psnr=_closeness(made, stock),
        latent_psnr=_median(latent_psnr, _latents(made), _latents(stock)),
        ssim=_median(ssim, images, _images(stock)) if images else None,
        converged=None if converged is None else _closeness(made, converged),
    )


def latent_psnr(latents: Tensor, references: Tensor) -> NDArray[np.float64]:
    """Returns the peak signal-to-noise ratio in dB, shape ``[images]``; the peak is the range of the reference."""
    errors = (latents - references).flatten(1).square().mean(1)
    flat = references.flatten(1)
    ratio: NDArray[np.float64] = ((flat.amax(1) - flat.amin(1)).square() / errors).double().numpy()
    return 10 * np.log10(ratio)


def _closeness(made: Sequence[Output], others: Sequence[Output]) -> float:
    """Returns the median PSNR of the images, or of the latents without images."""
    images = _images(made)
    if images:
        return _median(psnr, images, _images(others))
    return _median(latent_psnr, _latents(made), _latents(others))


def _images(made: Sequence[Output]) -> list[Images]:
    return [output.images for output in made if output.images is not None]


def _latents(made: Sequence[Output]) -> list[Tensor]:
    return [output.latents for output in made]


def _median(metric: Callable[[Any, Any], NDArray[np.float64]], made: Sequence[Any], others: Sequence[Any]) -> float:
    values = [metric(*pair) for pair in zip(made, others, strict=True)]
    return float(np.median(np.concatenate(values).clip(max=CLOSEST)))
