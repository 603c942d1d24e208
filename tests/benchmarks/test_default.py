"""The table of the default and fewer steps, out of figures of chunks."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import default
from benchmarks.default import (
    DEFAULT,
    FEWER,
    GUIDANCE,
    NOISY,
    SAMPLERS,
    SHARES,
    STOCK,
    Case,
    Chunk,
    cases,
    methods,
    rows,
)

CASE = Case("digits", "DDIM", 50, 3.0)


def chunk(method: str, share: float | None, first: int, *stock: float) -> Chunk:
    return Chunk(CASE, method, share, first, share or 1.0, list(stock), [value - 10 for value in stock])


CHUNKS = [
    chunk(STOCK, None, 0, 100.0, 100.0, 100.0),
    chunk(DEFAULT, 0.5, 2, 43.0),
    chunk(DEFAULT, 0.5, 0, 40.0, 42.0),
    chunk(FEWER, 0.5, 0, 30.0, 31.0, 36.0),
    chunk(DEFAULT, 0.4, 0, 40.0),  # nothing to compare it with yet
]


def test_a_gain_is_of_medians_over_all_chunks() -> None:
    made = {(row.method, row.share): row for row in rows(CHUNKS)}
    assert (made[DEFAULT, 0.5].images, made[DEFAULT, 0.5].stock, made[DEFAULT, 0.5].gain) == (3, 42.0, 11.0)
    assert made[FEWER, 0.5].gain is made[STOCK, None].gain is made[DEFAULT, 0.4].gain is None
    text = default.markdown(list(made.values()))
    assert "| digits | 0.5 | 1 | +11.0 | +11.0 | 0 |" in text
    assert "| digits | DDIM, 50 | 3 | 0.5 | 3 | 42.0 | 31.0 | +11.0 | 32.0 | 21.0 | 90.0 |" in text
    assert "| digits | 0.4 |" not in text


def test_records_are_read_as_they_were_made(tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    assert default.read(records) == []
    records.write_text("".join(json.dumps(default.asdict(each)) + "\n" for each in CHUNKS))
    assert default.read(records) == CHUNKS


def test_each_share_is_compared_with_as_many_steps() -> None:
    assert len(cases(list(GUIDANCE))) == len(SAMPLERS | NOISY) * sum(map(len, GUIDANCE.values()))
    for case in cases(["digits"]):
        variants = list(methods(case))
        for share in SHARES:
            default_one, fewer = (variant for variant, asked in variants if asked == share)
            assert default_one.config is not None
            assert (default_one.config.work, fewer.steps) == (share, round(share * case.steps))
