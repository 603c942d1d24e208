"""The passes, their order, and the driver that runs and checks them.

simplify           graph -> graph      remove assertions, inactive dropout, identities
bind               graph -> graph      label every value with the moment it becomes known
split_skips        graph -> graph      compute the skip's half of a decoder convolution once per group
share_guidance     graph -> graph      label what does not depend on the prompt: guidance need not duplicate it
partition          graph -> program    cut the graph into stages
forecast_features  program -> program  predict what the decoder reads from the last two key steps, if that is asked for
batch_steps        stage -> graph      vmap a stage over the steps of a group
fold_slices        graph -> graph      store the parts of weights that a stage reads, for packages that hold weights
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from fdcompile.graph.program import StagedProgram
from fdcompile.graph.weights import copy_of
from fdcompile.passes.batch_steps import batch_steps
from fdcompile.passes.bind import bind
from fdcompile.passes.fold_slices import fold_slices
from fdcompile.passes.forecast_features import forecast_features
from fdcompile.passes.partition import partition
from fdcompile.passes.share_guidance import share_guidance
from fdcompile.passes.simplify import simplify
from fdcompile.passes.split_skips import split_skips
from fdcompile.passes.verify import VerificationError, verify_graph, verify_program

__all__ = [
    "DUMP_VARIABLE",
    "OPTIONAL_PASSES",
    "PASSES",
    "Pass",
    "PassError",
    "batch_steps",
    "fold_slices",
    "run_passes",
]

DUMP_VARIABLE = "FDCOMPILE_DUMP"
"""Environment variable: a directory that receives every intermediate graph as text."""


@dataclass(frozen=True)
class Pass:
    """A named graph rewrite. `requires` and `ensures` are the facts it needs and adds; the driver asserts them.

    An `optional` pass makes a program faster and can be left out.
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
    # Splits only what is known at different times, and labels what it adds: `partition` reads every node's label.
    Pass("split_skips", split_skips, requires=frozenset({"bound"}), optional=True),
    # Last: it refines labels that binding again would overwrite.
    Pass("share_guidance", share_guidance, requires=frozenset({"bound"}), optional=True),
)

OPTIONAL_PASSES = tuple(step.name for step in PASSES if step.optional)


class PassError(RuntimeError):
    """A pass failed. The message names it, the passes before it and the file with the graph it was given."""


def run_passes(
    graph_module: fx.GraphModule, cut: tuple[str, ...], passes: tuple[Pass, ...] = PASSES, forecast: bool = False
) -> StagedProgram:
    """Runs the table, `partition` and, with `forecast`, `forecast_features`.

    The graph is verified before the first and the program after the last. Works on a copy that shares the weights of
    `graph_module`.

    Raises:
        PassError: a pass raised, its requirements were not met, or a verifier found the result malformed.
    """
    facts: set[str] = set()
    done: list[str] = []
    current = "verify"
    graph_module = copy_of(graph_module)
    _dump(graph_module, "0_captured")
    text = str(graph_module.graph)
    try:
        verify_graph(graph_module)
        for number, step in enumerate(passes, start=1):
            current = step.name
            text = str(graph_module.graph)
            if missing := step.requires - facts:
                raise VerificationError(f"needs {sorted(missing)}, which no earlier pass ensures")
            modified = step.run(graph_module, cut)
            facts |= step.ensures
            done.append(step.name if modified else f"{step.name} (no change)")
            _dump(graph_module, f"{number}_{step.name}")
        current = "partition"
        text = str(graph_module.graph)
        program = partition(graph_module)
        done.append("partition")
        if forecast:
            current = "forecast_features"
            done.append(current if forecast_features(program) else f"{current} (no change)")
        current = "verify"
        verify_program(program)
    except Exception as error:
        raise PassError(_failure(current, done, text, error)) from error
    for stage in program.stages.values():
        _dump(stage.graph_module, f"{len(passes) + 1}_{stage.name}")
    return program


def _failure(name: str, done: list[str], graph: str, error: Exception) -> str:
    directory = Path(os.environ.get(DUMP_VARIABLE) or tempfile.mkdtemp(prefix="fdcompile_"))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"failed_{name}.txt"
    path.write_text(graph)
    return (
        f"pass '{name}' failed: {type(error).__name__}: {error}\n"
        f"passes before it: {', '.join(done) or 'none'}\n"
        f"the graph it was given: {path}"
    )


def _dump(graph_module: fx.GraphModule, name: str) -> None:
    if directory := os.environ.get(DUMP_VARIABLE):
        Path(directory).mkdir(parents=True, exist_ok=True)
        text = graph_module.print_readable(print_output=False, include_stride=False, include_device=False)
        (Path(directory) / f"{name}.txt").write_text(text)
