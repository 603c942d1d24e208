"""Metrics of two batches of pictures, picture by picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Pictures = NDArray[np.uint8]
"""RGB pictures, shape ``[pictures, height, width, 3]``."""

AMPLIFICATION = 4
"""Factor of the differences in reports."""


def psnr(pictures: Pictures, references: Pictures) -> NDArray[np.float64]:
    """Returns the PSNR in dB of each picture to its reference, shape ``[pictures]``; infinite for identical ones.

    Raises:
        ValueError: the batches are not uint8 pictures of the same shape.
    """
    from skimage.metrics import peak_signal_noise_ratio

    with np.errstate(divide="ignore"):
        return _each(peak_signal_noise_ratio, pictures, references)


def ssim(pictures: Pictures, references: Pictures) -> NDArray[np.float64]:
    """Returns the structural similarity of each picture to its reference, shape ``[pictures]``; 1 for identical ones.

    Raises:
        ValueError: the batches are not uint8 pictures of the same shape, or smaller than the window of 7 pixels.
    """
    from skimage.metrics import structural_similarity

    return _each(structural_similarity, pictures, references, channel_axis=-1)


def difference(pictures: Pictures, references: Pictures) -> Pictures:
    """Returns the absolute differences of pictures and their references, amplified by `AMPLIFICATION`."""
    amplified: Pictures = np.abs(references.astype(np.int16) - pictures) * AMPLIFICATION
    return amplified.clip(0, 255).astype(np.uint8)


def _each(metric: Any, pictures: Pictures, references: Pictures, **options: Any) -> NDArray[np.float64]:
    for batch in (pictures, references):
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape != pictures.shape:
            raise ValueError(
                f"expected two uint8 batches [pictures, height, width, 3] of one shape, got "
                f"{pictures.dtype} {pictures.shape} and {references.dtype} {references.shape}"
            )
    pairs = zip(references, pictures, strict=True)
    return np.array([metric(*pair, data_range=255, **options) for pair in pairs])
