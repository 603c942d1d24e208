"""The table of passes, and the driver that runs and checks them."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from fdcompile.errors import PassError
from fdcompile.graph.program import StagedProgram
from fdcompile.graph.store import save_graph
from fdcompile.graph.text import graph_text
from fdcompile.graph.weights import copy_of
from fdcompile.passes.bind import bind
from fdcompile.passes.dump import Dump
from fdcompile.passes.forecast_features import forecast_features
from fdcompile.passes.partition import partition
from fdcompile.passes.record import Record, snapshot
from fdcompile.passes.simplify import simplify
from fdcompile.passes.split_skips import split_skips
from fdcompile.passes.verify import VerificationError, verify, verify_program, verify_values

VERIFY_VARIABLE = "FDCOMPILE_VERIFY"
"""Environment variable: checks whether each pass reports its changes correctly, and the metadata of changed nodes."""


@dataclass(frozen=True)
class Pass:
    """A named graph rewrite.

    Attributes:
        run: rewrites the graph in place, given the cut; returns whether it changed anything.
        requires: facts that must hold before it, by name in `verify.FACTS`.
        ensures: facts that hold from then on; the driver checks them after this and every later pass.
        optional: whether it only makes programs faster and can be disabled.
    """

    name: str
    run: Callable[[fx.GraphModule, tuple[str, ...]], bool]
    requires: frozenset[str] = frozenset()
    ensures: frozenset[str] = frozenset()
    optional: bool = False


PASSES: tuple[Pass, ...] = (
    Pass("simplify", lambda graph, cut: simplify(graph), ensures=frozenset({"simple"})),
    # Dropout and identities would hide the patterns of later passes, and their copies would cost stages.
    Pass("bind", bind, requires=frozenset({"simple"}), ensures=frozenset({"bound"})),
    # Splits only values of different binding times, and labels new nodes, because `partition` reads all labels.
    Pass("split_skips", split_skips, requires=frozenset({"bound"}), optional=True),
)

OPTIONAL_PASSES = tuple(step.name for step in PASSES if step.optional)


def enabled_passes(disabled: Sequence[str]) -> tuple[Pass, ...]:
    """The pass table without the `disabled` passes.

    Raises:
        ValueError: one of them is not an optional pass.
    """
    if unknown := set(disabled) - set(OPTIONAL_PASSES):
        raise ValueError(f"disabled_passes: {sorted(unknown)}: expected names out of {list(OPTIONAL_PASSES)}")
    return tuple(step for step in PASSES if step.name not in disabled)


_CAPTURE = Pass("capture", lambda graph, cut: False, ensures=frozenset({"functional"}))
"""Row for the capture, which ensures the facts that the first pass relies on, and appears in messages."""


def run_passes(
    graph_module: fx.GraphModule,
    cut: tuple[str, ...],
    passes: tuple[Pass, ...] = PASSES,
    forecast: bool = False,
    dump: bool = True,
) -> StagedProgram:
    """Runs the table, `partition` and, with `forecast`, `forecast_features`, and checks all ensured facts after each.

    Works on a copy that shares the weights of `graph_module`. Without `dump` nothing is written to the
    directory that `DUMP_VARIABLE` names.

    Raises:
        PassError: a pass raised, its requirements were not met, or its result is malformed.
    """
    files = Dump.if_wanted(graph_module) if dump else None
    rows = (_CAPTURE, *passes)
    current, facts, name = copy_of(graph_module), frozenset[str](), ""
    done: list[str] = []
    try:
        for number, row in enumerate(rows):
            name = row.name
            if missing := row.requires - facts:
                raise VerificationError(f"needs {sorted(missing)}, which no earlier pass ensures")
            facts |= row.ensures
            record = _apply(row, current, cut, facts)
            if files is not None:
                files.write_graph(number, record, current)
            done.append(str(record))
        name = "partition"
        program = _staged(current)
        if forecast:
            done.append(name)
            name = "forecast_features"
            _forecast(program)
    except Exception as error:
        given = copy_of(graph_module)
        for row in itertools.takewhile(lambda row: row.name != name, rows):
            row.run(given, cut)
        folder = files.folder if files is not None else Path(tempfile.mkdtemp(prefix="fdcompile_"))
        before = ", ".join(done[1:]) or "none"
        head = f"pass '{name}' failed: {type(error).__name__}: {error}\npasses before it: {before}\n"
        raise PassError(head + _given(folder, name, given, cut)) from error
    if files is not None:
        for stage in program.stages.values():
            files.write_stage(len(rows), stage)
    return program


def run_pass(name: str, graph_module: fx.GraphModule, cut: tuple[str, ...]) -> None:
    """Runs and checks pass `name`, of the table or after it, on a graph that the earlier passes have produced.

    Raises:
        ValueError: there is no such pass.
        VerificationError: its result is malformed. Exceptions of the pass itself are raised as they are.
    """
    if name in ("partition", "forecast_features"):
        program = _staged(graph_module)
        if name == "forecast_features":
            _forecast(program)
        return
    rows = (_CAPTURE, *PASSES)
    names = [row.name for row in rows]
    if name not in names:
        raise ValueError(f"{name!r} is no pass: expected one of {[*names, 'partition', 'forecast_features']}")
    number = names.index(name)
    _apply(rows[number], graph_module, cut, frozenset().union(*(row.ensures for row in rows[: number + 1])))


def _apply(row: Pass, graph_module: fx.GraphModule, cut: tuple[str, ...], facts: frozenset[str]) -> Record:
    before, began = snapshot(graph_module), time.perf_counter()
    modified = row.run(graph_module, cut)
    record = Record.of(row.name, time.perf_counter() - began, before, snapshot(graph_module))
    verify(graph_module, facts)
    if os.environ.get(VERIFY_VARIABLE):
        if modified != record.modified:
            raise VerificationError(f"reports {'modified' if modified else 'no change'}, but made: {record.changes}")
        verify_values(graph_module, {*record.added, *record.rewritten})
    return record


def _staged(graph_module: fx.GraphModule) -> StagedProgram:
    program = partition(graph_module)
    verify_program(program)
    return program


def _forecast(program: StagedProgram) -> None:
    forecast_features(program)
    verify_program(program)


def _given(folder: Path, name: str, graph_module: fx.GraphModule, cut: tuple[str, ...]) -> str:
    """Stores the input graph of pass `name`, and describes how to run that pass on it."""
    text, graph = (folder / f"failed_{name}.{kind}" for kind in ("txt", "graph"))
    text.write_text(graph_text(graph_module) + "\n", encoding="utf-8")
    given = f"the graph it was given: {text}\n"
    try:
        save_graph(graph_module, graph)
    except Exception as error:  # must not replace the error of the pass
        return f"{given}which could not be stored to run the pass alone: {type(error).__name__}: {error}"
    return (
        f"{given}"
        f"to run it alone:\n"
        f"    from fdcompile.passes import load_graph, run_pass\n"
        f"    graph_module = load_graph({str(graph)!r})\n"
        f"    run_pass({name!r}, graph_module, cut={cut!r})"
    )
