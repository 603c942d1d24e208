"""How close images are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fdcompile.measure.metrics import psnr, ssim


def batch(*values: int) -> Any:
    return np.stack([np.full((8, 8, 3), value, np.uint8) for value in values])


def test_metrics_judge_image_by_image() -> None:
    distances = psnr(batch(10, 30), batch(10, 20))
    assert distances[0] == math.inf
    assert distances[1] == pytest.approx(20 * math.log10(255 / 10))
    similarities = ssim(batch(10, 30), batch(10, 20))
    assert similarities[0] == 1
    assert 0 < similarities[1] < 1


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_metrics_refuse_what_cannot_be_compared(metric: Any) -> None:
    with pytest.raises(ValueError, match="of one shape"):
        metric(batch(1, 2), batch(1))
    with pytest.raises(ValueError, match="uint8"):
        metric(batch(1).astype(np.float32), batch(1).astype(np.float32))
