"""Runs the graph of a stage eagerly, one kernel per operation."""

from __future__ import annotations

from torch import fx

from fdcompile.backends.protocols import Lowered


class EagerBackend:
    """Backend without compilation: the reference for other backends."""

    name = "eager"

    def lower(self, graph_module: fx.GraphModule, name: str) -> Lowered:
        return graph_module
