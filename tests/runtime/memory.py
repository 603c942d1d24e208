"""Draws images of SIZES sizes, of which LIMIT are kept, and prints what is then in memory, a line for each.

Objects of torch that belong to traces, entries in its cache of fake tensors, and the most resident memory yet, in KiB.
"""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import flat_pipe, sample

import fdcompile
from fdcompile import Config

sizes, limit = map(int, sys.argv[1:])
pipe = fdcompile.optimize(flat_pipe(), Config(key_steps=3, cache_size_limit=limit))
for width in range(1, sizes + 1):
    sample(pipe, steps=4, height=8, width=8 * width)
    gc.collect()
    traces = sum(type(item) is ShapeEnv for item in gc.get_objects())
    print(traces, len(FakeTensorMode.cache), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
