"""The worth of passes: a row for each, with what was counted."""

from __future__ import annotations

import pytest

from benchmarks.passes import markdown, measure
from benchmarks.settings import Setting
from fdcompile.passes import OPTIONAL_PASSES


@pytest.mark.tables
def test_each_optional_pass_has_a_row_of_flops_and_of_as_many_times_as_asked_for() -> None:
    rows = list(measure(Setting("SD 1.5", latents=8, batch=1, steps=6, key_steps=6, small=True), pairs=2))
    assert tuple(row.name for row in rows) == OPTIONAL_PASSES
    assert [len(row.times) for row in rows] == [2] * len(rows)
    assert all(row.flops < 1 for row in rows), "each saves work"
    table = markdown(rows, pairs=2)
    assert all(f"| {name} |" in table for name in OPTIONAL_PASSES)
