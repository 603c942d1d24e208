"""One image on several processes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fdcompile import Config
from fdcompile.runtime.ranks import Ranks

HERE = Path(__file__).parent


def run(what: str, count: int, scratch: Path, dies: int | None = None) -> list[Any]:
    """What each rank prints, a value a line; the one that `dies` says less."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parents[1])])}
    command = [sys.executable, "-W", "ignore", str(HERE / "rank.py"), what]
    rest = [str(count), str(scratch / "store")]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), *rest], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    printed = []
    for number, rank in enumerate(ranks):
        output, errors = rank.communicate(timeout=900)
        assert rank.returncode == (9 if number == dies else 0), errors[-3000:]
        printed.append([json.loads(line) for line in output.splitlines()])
    return printed


@pytest.mark.parametrize(
    ("count", "together", "one_by_one", "forecast"),
    [
        (2, ((8, 4), (5, 4)), ((8, 8), (8, 8)), ((7, 4), (6, 4))),
        pytest.param(3, ((5, 4), (5, 4), (4, 4)), ((5, 5),) * 3, ((5, 4),) * 3, marks=pytest.mark.tables),
    ],
)
def test_ranks_that_decode_together_equal_one_alone(
    count: int, together: Any, one_by_one: Any, forecast: Any, tmp_path: Path
) -> None:
    """In groups of 1, 3, 5 and 3 steps, by default of 2, 6, 3 and 1; each says its decoder evaluations and calls."""
    for rank, (runs,) in enumerate(run("equal", count, tmp_path)):
        expected = {"hold 16": together, "linear 16": together, "hold 1": one_by_one, "auto 16": forecast}
        for kind, (error, evaluations, calls, full) in runs.items():
            assert error < 1e-4, kind
            assert (evaluations, calls, full) == (*expected[kind][rank], 0), kind


def test_ranks_that_drift_apart_are_refused_and_one_that_dies_ends_the_others(tmp_path: Path) -> None:
    """Another seed; latents nudged, a prompt changed or noise drawn on one rank in the middle of a run."""
    (other, drifted, dead), (likewise, drifted_there) = run("faults", 2, tmp_path, dies=1)
    assert (other, drifted) == (likewise, drifted_there)
    for message in (other, *drifted):
        assert message.startswith("rank 1 of the process group does not run what rank 0 runs")
    assert dead.startswith("rank 0 of 2 got no answer from the other ranks: one has exited")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_shares_are_all_steps_once_and_none_is_empty(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Ranks(None) for _ in range(count)]
    for number, rank in enumerate(ranks):
        rank.count, rank._rank = count, number
    for first, stop, most in ((0, 1, 16), (3, 8, 16), (3, 8, 1), (0, 20, 2), (5, 11, 3)):
        done = first
        while done < stop:
            shares = [rank.share(done, stop, most) for rank in ranks]
            (end,) = {end for _, end in shares}
            steps = [step for share, _ in shares for step in range(share.start, share.stop)]
            assert set(steps) == set(range(done, end))
            assert all(0 < share.stop - share.start <= most for share, _ in shares)
            each = -(-(end - done) // count)
            padded = [[*range(share.start, share.stop), *[-1] * each][:each] for share, _ in shares]
            assert [*itertools.chain(*padded)][: end - done] == list(range(done, end)), "what `gather` makes of them"
            done = end


@pytest.mark.parametrize("value", ["world", 0, torch.nn.Identity()])
def test_what_is_no_process_group_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"process_group=.*such as torch\.distributed\.group\.WORLD after init_process"):
        Config(process_group=value)


def test_a_process_group_is_not_written(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        config = Config(process_group=torch.distributed.group.WORLD)
        with pytest.raises(ValueError, match="process_group: it cannot be written"):
            config.to_dict()
    finally:
        torch.distributed.destroy_process_group()
    assert "process_group" not in Config.paper().to_dict()
