"""Metrics of two batches of pictures, picture by picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Pictures = NDArray[np.uint8]
"""RGB pictures, shape ``[pictures, height, width, 3]``."""

_DATA_RANGE = 255

AMPLIFICATION = 4
"""Factor of the differences in reports."""


def psnr(pictures: Pictures, references: Pictures) -> NDArray[np.float64]:
    """Returns the PSNR in dB of each picture to its reference, shape ``[pictures]``; infinite for identical ones.

    Raises:
        ValueError: the batches are not uint8 pictures of the same shape.
    """
    from skimage.metrics import peak_signal_noise_ratio

    _check(pictures, references)
    pairs = zip(references, pictures, strict=True)
    with np.errstate(divide="ignore"):
        return np.array([peak_signal_noise_ratio(*pair, data_range=_DATA_RANGE) for pair in pairs])


def ssim(pictures: Pictures, references: Pictures) -> NDArray[np.float64]:
    """Returns the structural similarity of each picture to its reference, shape ``[pictures]``; 1 for identical ones.

    Raises:
        ValueError: the batches are not uint8 pictures of the same shape, or smaller than the window of 7 pixels.
    """
    from skimage.metrics import structural_similarity

    _check(pictures, references)
    pairs = zip(references, pictures, strict=True)
    return np.array([structural_similarity(*pair, data_range=_DATA_RANGE, channel_axis=-1) for pair in pairs])


def difference(pictures: Pictures, references: Pictures) -> Pictures:
    """Returns the absolute differences of pictures and their references, amplified by `AMPLIFICATION`."""
    amplified: Pictures = np.abs(references.astype(np.int16) - pictures) * AMPLIFICATION
    return amplified.clip(0, 255).astype(np.uint8)


def _check(pictures: Pictures, references: Pictures) -> None:
    for batch in (pictures, references):
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape != pictures.shape:
            raise ValueError(
                f"expected two uint8 batches [pictures, height, width, 3] of one shape, got "
                f"{pictures.dtype} {pictures.shape} and {references.dtype} {references.shape}"
            )
