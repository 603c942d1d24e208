"""Run a stage's graph as it is, one kernel an operation."""

from __future__ import annotations

from torch import fx

from fdcompile.backends.protocols import Lowered


class EagerBackend:
    """No compilation: the reference that the others are compared with."""

    name = "eager"

    def lower(self, graph_module: fx.GraphModule, name: str) -> Lowered:
        return graph_module
