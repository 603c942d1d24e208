"""Metrics of two batches of images, image by image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
"""RGB images, shape ``[images, height, width, 3]``."""

AMPLIFICATION = 4
"""Factor of the differences in reports."""


def psnr(images: Images, references: Images) -> NDArray[np.float64]:
    """Returns the PSNR in dB of each image to its reference, shape ``[images]``; infinite for identical ones.

    Raises:
        ValueError: the batches are not uint8 images of the same shape.
    """
    from skimage.metrics import peak_signal_noise_ratio

    with np.errstate(divide="ignore"):
        return _each(peak_signal_noise_ratio, images, references)


def ssim(images: Images, references: Images) -> NDArray[np.float64]:
    """Returns the structural similarity of each image to its reference, shape ``[images]``; 1 for identical ones.

    Raises:
        ValueError: the batches are not uint8 images of the same shape, or smaller than the window of 7 pixels.
    """
    from skimage.metrics import structural_similarity

    return _each(structural_similarity, images, references, channel_axis=-1)


def difference(images: Images, references: Images) -> Images:
    """Returns the absolute differences of images and their references, amplified by `AMPLIFICATION`."""
    amplified: Images = np.abs(references.astype(np.int16) - images) * AMPLIFICATION
    return amplified.clip(0, 255).astype(np.uint8)


def _each(metric: Any, images: Images, references: Images, **options: Any) -> NDArray[np.float64]:
    for batch in (images, references):
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape != images.shape:
            raise ValueError(
                f"expected two uint8 batches [images, height, width, 3] of one shape, got "
                f"{images.dtype} {images.shape} and {references.dtype} {references.shape}"
            )
    pairs = zip(references, images, strict=True)
    return np.array([metric(*pair, data_range=255, **options) for pair in pairs])
