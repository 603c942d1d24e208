"""How many programs are kept, and that what is dropped is gone."""

from __future__ import annotations

import gc
import resource
import weakref
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


@pytest.mark.tables
def test_memory_is_level_after_the_bound() -> None:
    """Of 30 sizes: what 10 after the bound add is little beside what 10 before it add."""
    pipe = fdcompile.optimize(flat_pipe(), Config(key_steps="all", cache_size_limit=10))

    def resident(widths: range) -> int:
        for width in widths:
            sample(pipe, steps=2, height=8, width=8 * width)
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    begin, bound, after, end = (
        resident(widths) for widths in (range(1, 2), range(2, 11), range(11, 21), range(21, 31))
    )
    print(f"KiB: {begin}, {bound} at the bound, {after} and {end} ten sizes later each")
    assert end - after < (bound - begin) / 2
