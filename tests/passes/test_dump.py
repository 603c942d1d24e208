"""What `FDCOMPILE_DUMP` leaves: every graph, what each pass did to it, and a page that links them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from models import sample, small_pipe
from toy import DECODER, toy_graph

import fdcompile
from fdcompile import Config
from fdcompile.passes import DUMP_VARIABLE, run_passes

NAMES = [
    *("0_capture", "1_simplify", "2_bind", "3_split_skips"),
    *("4_decoder", "4_encoder", "4_prompt", "4_schedule"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path / "dump"))
    return tmp_path / "dump"


def test_a_head_says_what_the_pass_did_and_nodes_say_when_they_are_known(folder: Path) -> None:
    run_passes(toy_graph()[0], DECODER)
    files = {path.stem: path.read_text() for path in (folder / "1").iterdir()}
    assert sorted(files) == NAMES
    assert "dropout" in files["0_capture"]
    assert "dropout" not in files["1_simplify"]
    head = r"# simplify: 7 removed, 5 rewritten, \d+\.\d ms\n# GFLOP per latent: 2.774e-05\n"
    assert re.match(head, files["1_simplify"])
    assert files["2_bind"].splitlines()[1] == (
        "# GFLOP per latent: 2.774e-05 (schedule 7.2e-08, prompt 2.4e-08, key 2.074e-05, step 6.912e-06)"
    )
    assert files["3_split_skips"].startswith("# split_skips: no change, ")
    assert "\n%conv2d_5 [step] : conv2d(%silu_2, weight, bias" in files["3_split_skips"]
    assert files["4_decoder"].startswith("# decoder (5 ops, 6.912e-06 GFLOP per latent)\n#   in   conv2d_3: float32[B")


def test_compilations_have_folders_of_their_own_and_one_page_links_their_files(folder: Path) -> None:
    for _ in range(2):
        run_passes(toy_graph()[0], DECODER)
    links = re.findall(r"\]\((.*?)\)", (folder / "index.md").read_text())
    assert sorted(links) == [f"{number}/{name}.txt" for number in (1, 2) for name in NAMES]
    assert all((folder / link).is_file() for link in links)


def test_only_what_was_compiled_for_a_run_is_dumped(folder: Path) -> None:
    pipe = fdcompile.optimize(small_pipe(), Config(key_steps=3))
    sample(pipe, steps=3)
    assert "saved by pass" in str(fdcompile.explain(pipe)), "for which it compiles variants"
    assert sorted(path.name for path in folder.iterdir()) == ["1", "index.md"]


def test_nothing_is_written_where_it_is_not_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DUMP_VARIABLE)
    run_passes(toy_graph()[0], DECODER)
    assert not folder.exists()
