"""Writes every graph of a compilation as text, with the changes of each pass, and an index."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path

from torch import fx

from fdcompile.graph.flops import FlopInterpreter, concrete_shape
from fdcompile.graph.program import BindingTime, Stage
from fdcompile.graph.text import graph_text
from fdcompile.passes.record import Record

DUMP_VARIABLE = "FDCOMPILE_DUMP"
"""Environment variable: a directory that receives every intermediate graph as text."""

_LATENTS = 2
"""Batch size for which FLOPs are counted."""


class Dump:
    """The files of one compilation, in one folder; `index.md` next to the folders links the files of all.

    Attributes:
        folder: numbered, inside the directory that `DUMP_VARIABLE` names.
    """

    def __init__(self, directory: Path, graph_module: fx.GraphModule) -> None:
        self._index = directory / "index.md"
        for number in itertools.count(1):
            self.folder = directory / str(number)
            try:
                self.folder.mkdir(parents=True)
                break
            except FileExistsError:
                continue
        head = "| graph | nodes | changes | milliseconds | GFLOP per latent |\n|---|---|---|---|---|\n"
        inputs = graph_text(graph_module, graph_module.graph.find_nodes(op="placeholder"))
        self._append(f"\n## {number}\n\n```\n{inputs}\n```\n\n{head}")

    @classmethod
    def if_wanted(cls, graph_module: fx.GraphModule) -> Dump | None:
        """A dump of `graph_module`'s compilation if the environment asks for one, else None."""
        directory = os.environ.get(DUMP_VARIABLE)
        return cls(Path(directory), graph_module) if directory else None

    def write_graph(self, number: int, record: Record, graph_module: fx.GraphModule) -> None:
        """Writes the graph after the pass of `record`, the table's `number`-th."""
        milliseconds, flops = f"{record.seconds * 1e3:.1f}", _by_time(graph_module)
        head = f"# {record.name}: {record.changes}, {milliseconds} ms\n# GFLOP per latent: {flops}\n\n"
        name = f"{number}_{record.name}"
        self._write(name, head + graph_text(graph_module))
        self._link(name, graph_module, record.changes, milliseconds, flops)

    def write_stage(self, number: int, stage: Stage) -> None:
        """Writes the graph of a stage."""
        head = "".join(f"# {line}\n" for line in str(stage).splitlines())
        name = f"{number}_{stage.name}"
        self._write(name, f"{head}\n{graph_text(stage.graph_module)}")
        self._link(name, stage.graph_module, "", "", f"{stage.flops(_LATENTS) / _LATENTS / 1e9:.4g}")

    def _write(self, name: str, text: str) -> None:
        (self.folder / f"{name}.txt").write_text(text + "\n", encoding="utf-8")

    def _link(self, name: str, graph_module: fx.GraphModule, *cells: str) -> None:
        row = (f"[{name}]({self.folder.name}/{name}.txt)", str(len(graph_module.graph.nodes)), *cells)
        self._append(f"| {' | '.join(row)} |\n")

    def _append(self, text: str) -> None:
        with self._index.open("a", encoding="utf-8") as file:
            file.write(text)


def _by_time(graph_module: fx.GraphModule) -> str:
    """GFLOP for each latent, by binding time once nodes are labeled."""
    inputs = [concrete_shape(node.meta["val"], _LATENTS) for node in graph_module.graph.find_nodes(op="placeholder")]
    latents = inputs[0].size[0]
    counts: Counter[BindingTime | None] = Counter()
    for node, flops in FlopInterpreter(graph_module).count(inputs).items():
        counts[node.meta.get("binding_time")] += flops
    gflop = {time: counts[time] / latents / 1e9 for time in (*BindingTime, None) if counts[time]}
    parts = ", ".join(f"{time} {count:.4g}" for time, count in gflop.items() if time is not None)
    return f"{sum(gflop.values()):.4g}" + (f" ({parts})" if parts else "")
