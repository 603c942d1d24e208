"""Changes that a pass made to a graph, from a comparison of the graph before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

Snapshot = dict[str, tuple[Any, Any]]
"""Operation and labels of each node by name, in the order of the graph."""


def snapshot(graph_module: fx.GraphModule) -> Snapshot:
    return {node.name: (_operation(node), _labels(node)) for node in graph_module.graph.nodes}


def _operation(node: fx.Node) -> tuple[Any, ...]:
    return node.op, node.target, str(node.args), str(node.kwargs)


def _labels(node: fx.Node) -> tuple[Any, ...]:
    return node.meta.get("binding_time"), node.meta.get("recomputed", False)


@dataclass(frozen=True)
class Record:
    """Changes that pass `name` made in `seconds`: names of nodes by kind of change, and whether any moved."""

    name: str
    seconds: float
    added: tuple[str, ...]
    removed: tuple[str, ...]
    rewritten: tuple[str, ...]
    relabeled: tuple[str, ...]
    moved: bool

    @classmethod
    def of(cls, name: str, seconds: float, before: Snapshot, after: Snapshot) -> Record:
        kept = [node for node in after if node in before]
        return cls(
            name,
            seconds,
            added=tuple(node for node in after if node not in before),
            removed=tuple(node for node in before if node not in after),
            rewritten=tuple(node for node in kept if before[node][0] != after[node][0]),
            relabeled=tuple(node for node in kept if before[node][1] != after[node][1]),
            moved=kept != [node for node in before if node in after],
        )

    @property
    def modified(self) -> bool:
        return any((self.added, self.removed, self.rewritten, self.relabeled, self.moved))

    @property
    def changes(self) -> str:
        counts = {kind: len(getattr(self, kind)) for kind in ("added", "removed", "rewritten", "relabeled")}
        parts = [f"{count} {kind}" for kind, count in counts.items() if count]
        return ", ".join([*parts, *(["some moved"] if self.moved else [])]) or "no change"

    def __str__(self) -> str:
        return self.name if self.modified else f"{self.name} (no change)"
