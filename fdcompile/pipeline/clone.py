"""Clones of pipelines."""

from __future__ import annotations

import copy
import itertools
from typing import Any


def clone(pipe: Any) -> Any:
    """Copies a pipeline with shared weights, so that one can be optimized while the other remains stock."""
    weights = {id(tensor): tensor for tensor in itertools.chain(pipe.unet.parameters(), pipe.unet.buffers())}
    other = copy.copy(pipe)
    other.unet = copy.deepcopy(pipe.unet, weights)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    return other
