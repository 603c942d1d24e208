"""Closeness of runs to other runs of the same calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fdcompile.measure.calls import Output
from fdcompile.measure.metrics import Pictures, psnr, ssim

CLOSEST = 100.0
"""Decibels that equal pictures count as, which have infinitely many."""


@dataclass(frozen=True)
class Fidelity:
    """Closeness of runs to the stock runs of the same calls: medians over the held-out pictures.

    Attributes:
        psnr: of the pictures in dB, or of the latents in a pipeline that returns no pictures. Equal ones count as
            `CLOSEST`.
        latent_psnr: of the latents in dB, their range taken from the stock run's.
        ssim: structural similarity of the pictures, None without pictures.
        converged: as `psnr`, to the stock run with many steps, None where there is none.
    """

    psnr: float
    latent_psnr: float
    ssim: float | None
    converged: float | None


def judge(made: Sequence[Output], stock: Sequence[Output], converged: Sequence[Output] | None = None) -> Fidelity:
    """Compares runs with the stock runs of the same calls, and with stock runs of many steps if there are any."""
    pictures, references = _pictures(made), _pictures(stock)
    return Fidelity(
        psnr=_closeness(made, stock),
        latent_psnr=_median([latent_psnr(*pair) for pair in _latents(made, stock)]),
        ssim=_median([ssim(*pair) for pair in zip(pictures, references, strict=True)]) if pictures else None,
        converged=None if converged is None else _closeness(made, converged),
    )


def latent_psnr(latents: Tensor, references: Tensor) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio in dB, shape ``[pictures]``; the peak is the range of the reference."""
    errors = (latents - references).flatten(1).square().mean(1)
    flat = references.flatten(1)
    ratio: NDArray[np.float64] = ((flat.amax(1) - flat.amin(1)).square() / errors).double().numpy()
    return 10 * np.log10(ratio)


def _closeness(made: Sequence[Output], others: Sequence[Output]) -> float:
    """PSNR of the pictures, or of the latents of a pipeline that returns none."""
    pictures = _pictures(made)
    if pictures:
        return _median([psnr(*pair) for pair in zip(pictures, _pictures(others), strict=True)])
    return _median([latent_psnr(*pair) for pair in _latents(made, others)])


def _pictures(made: Sequence[Output]) -> list[Pictures]:
    return [output.pictures for output in made if output.pictures is not None]


def _latents(made: Sequence[Output], others: Sequence[Output]) -> list[tuple[Tensor, Tensor]]:
    return [(output.latents, other.latents) for output, other in zip(made, others, strict=True)]


def _median(values: list[NDArray[np.float64]]) -> float:
    return float(np.median(np.concatenate(values).clip(max=CLOSEST)))
