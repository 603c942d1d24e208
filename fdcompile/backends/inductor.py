"""Compile a stage with torch.compile."""

from __future__ import annotations

import torch
from torch import fx

from fdcompile.backends import Lowered


class InductorBackend:
    """One `torch.compile` a stage, without graph breaks; compiled at the first call of a stage for a batch size.

    Batch sizes are compiled one by one (``dynamic=False``): a serving batch is fixed, and static shapes are faster.
    """

    name = "inductor"

    def lower(self, graph_module: fx.GraphModule, name: str) -> Lowered:
        compiled: Lowered = torch.compile(graph_module, fullgraph=True, dynamic=False)
        return compiled
