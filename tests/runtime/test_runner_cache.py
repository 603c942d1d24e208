"""How many programs are kept, and that what is dropped is gone."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
from models import assert_equal, flat_pipe, sample

import fdcompile
from fdcompile import Config
from fdcompile.pipeline.session import find_session


def runner_cache(pipe: Any) -> Any:
    session = find_session(pipe)
    assert session is not None
    return session.executor.runner_cache


def test_the_ones_used_last_are_kept_and_the_rest_is_freed() -> None:
    pipe, twin = fdcompile.optimize(flat_pipe(), Config(key_steps="all", cache_size_limit=2)), flat_pipe()
    kept: dict[int, Any] = {}
    for width in (8, 16, 8, 24):
        assert_equal(sample(pipe, height=8, width=width), sample(twin, height=8, width=width))
        kept[width] = weakref.ref(list(runner_cache(pipe).runners.values())[-1].captured)
    report = fdcompile.explain(pipe)
    assert (report.programs_held, report.programs_dropped) == (2, 1)
    assert "2, 1 dropped to make room" in str(report)
    del report
    gc.collect()
    assert [width for width, graph in kept.items() if graph() is None] == [16]
    assert list(runner_cache(pipe).graph_cache.graphs.values()) == [kept[8](), kept[24]()]
    assert_equal(sample(pipe, height=8, width=16), sample(twin, height=8, width=16))
    fdcompile.optimize(pipe, Config(key_steps=3, cache_size_limit=1))
    assert [runner.captured for runner in runner_cache(pipe).runners.values()] == [
        runner_cache(pipe).graph_cache.graphs.popitem()[1]
    ]


def memory(sizes: int, limit: int) -> list[list[int]]:
    """What ``memory.py`` counts, in a process of its own."""
    script = Path(__file__).with_name("memory.py")
    lines = subprocess.check_output([sys.executable, script, str(sizes), str(limit)], text=True).splitlines()
    return [[*map(int, line.split())] for line in lines]


def test_a_program_that_is_dropped_leaves_no_trace_behind() -> None:
    """Torch notes sizes and fake tensors while it traces, in places that outlive the graph."""
    first, *others = [counts[:2] for counts in memory(sizes=3, limit=1)]
    assert others == [first, first]


@pytest.mark.tables
def test_memory_is_level_after_the_bound() -> None:
    """Of 30 sizes: what 10 after the bound add is little beside what 10 before it add."""
    resident = [counts[2] for counts in memory(sizes=30, limit=10)]
    assert resident[29] - resident[19] < (resident[9] - resident[0]) / 2, resident
