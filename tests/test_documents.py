"""Documents: their Python runs, their commands and links exist, and the life of a UNet call is as the code does it."""

from __future__ import annotations

import json
import re
import shlex
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import typer
from diffusers import StableDiffusionPipeline
from models import TEXT, flat_pipe, sample, small_text_encoder

import fdcompile
from benchmarks.default import DEFAULT, NOISY
from fdcompile.cli.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(
    r"(?P<comment>^<!-- not run: [^>]+ -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


def blocks(page: str, language: str) -> list[tuple[int, str, bool]]:
    """Line, code, and whether it is to be run, of each block of `page` in `language`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start("code")), match["code"], match["comment"] is None)
        for match in BLOCK.finditer(text)
        if match["language"] == language
    ]


PAGES_THAT_RUN = [page for page in PAGES if any(run for _, _, run in blocks(page, "python"))]


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the blocks of a page begin with: one small pipeline, wherever they load one, on the CPU."""
    pipe = flat_pipe()
    tokenizer = fdcompile.load_miniature().tokenizer
    pipe.register_modules(tokenizer=tokenizer, text_encoder=small_text_encoder(tokenizer))
    pipe.vae_scale_factor = 64
    monkeypatch.setattr(type(pipe), "from_pretrained", lambda path: pipe)
    monkeypatch.setattr(type(pipe), "to", lambda self, *args: self)
    tensors = {"latents": torch.randn(1, 4, 8, 8), "text": torch.randn(1, *TEXT)}
    yield {"fdcompile": fdcompile, "torch": torch, "pipe": pipe, **tensors}
    fdcompile.restore(pipe)


def test_python_is_shown_on_these_pages() -> None:
    assert PAGES_THAT_RUN == ["README.md", "docs/configuration.md", "docs/serving.md"]


@pytest.mark.parametrize("page", PAGES_THAT_RUN)
def test_the_python_of_a_page_runs(
    page: str, namespace: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for line, code, run in blocks(page, "python"):
        program = compile("\n" * line + code, str(ROOT / page), "exec")
        if run:
            exec(program, namespace)


def commands(page: str) -> list[list[str]]:
    """Those of fdcompile in `page`, in words."""
    lines = "".join(code for _, code, _ in blocks(page, "sh")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(fdcompile [a-z][^`]*)`", (ROOT / page).read_text(encoding="utf-8"))
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[line.index("fdcompile") + 1 :] for line in words if "fdcompile" in line[:8] and line[0] != "pip"]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_the_commands_of_a_page_exist(page: str) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for verb, *words in commands(page):
        options = {option for parameter in known[verb].params for option in parameter.opts}
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= options, f"fdcompile {verb}: {given - options}"


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], link


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = {f"docs/{name}" for name in re.findall(r"\]\((\w[\w-]*\.md)\)", index)}
    assert linked == {page for page in PAGES if page.startswith("docs/")} - {"docs/index.md"}


def test_files_and_tests_that_are_named_exist() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(r"`((?:fdcompile|tests|benchmarks|examples)/[\w/]+(?:\.py|/))`", text):
            assert (ROOT / name).exists(), f"{page}: {name}"
        for path, test in re.findall(r"`(tests/[\w/.]+\.py)::(\w+)`", text):
            assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{page}: {path}::{test}"


def default_rows(share: float) -> list[dict[str, Any]]:
    """Rows of the table of the default, without samplers that draw noise, which have a table of their own."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "default.json").read_text(encoding="utf-8"))
    return [row for row in rows if (row["method"], row["share"]) == (DEFAULT, share) and row["sampler"] not in NOISY]


def test_the_figures_of_the_default_are_those_in_the_results() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for share in (0.2, 0.4, 0.5, 0.6):
        gains = [row["gain"] for row in default_rows(share)]
        spread = f"{min(gains):+.1f} | {statistics.median(gains):+.1f}"
        assert re.search(rf"^\| {share}.* \| {len(gains)} \| {re.escape(spread)} \|", results, re.MULTILINE), spread
    rows = default_rows(0.5)
    gains = [row["gain"] for row in rows]
    assert f"In {len(rows)} comparisons" in readme
    assert f"{min(gains):.1f} to {max(gains):.1f} dB closer" in readme
    assert f"(median {statistics.median(gains):.1f} dB)" in readme
    (usual,) = [row for row in rows if (row["model"], row["sampler"], row["guidance"]) == ("miniature", "DDIM", 3)]
    assert f"| the default | 0.50 of stock | **{usual['stock']:.1f} dB** |" in readme
    assert f"| stock with 25 steps | 0.50 of stock | {usual['stock'] - usual['gain']:.1f} dB |" in readme


def test_the_results_in_the_readme_are_those_of_the_table() -> None:
    table = (ROOT / "benchmarks" / "results" / "fidelity.md").read_text(encoding="utf-8")
    measured = {(*row[1:2], row[4], row[6], row[7]) for row in cells(table) if len(row) == 9}
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Results")[2].partition("\n## ")[0]
    shown = {tuple(cell.strip("*") for cell in row[1:]) for row in cells(section)[2:]}
    assert shown <= measured, shown - measured


def cells(text: str) -> list[list[str]]:
    """Cells of the rows of all tables in `text`."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_way_of_one_call_is_the_one_in_contributing(pipe: StableDiffusionPipeline) -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Life of a UNet call")[2].partition("\n## ")[0]
    nested, asked = (
        re.findall(r"^\|(?: \d \|)? `([\w.]+)` \| `([\w/.]+)` \|", table, re.MULTILINE)
        for table in section.split("Before `predict`")
    )
    fdcompile.optimize(pipe, fdcompile.Config(key_steps=(0, 5), recompute=fdcompile.DECODER, max_parallel_steps=1))
    sample(pipe, steps=6)  # captures
    seen, chain = second_call(pipe)
    assert len(nested) == 8
    assert chain == nested
    questions = [seen.index(call) for call in asked]
    assert questions == sorted(questions)
    assert questions[-1] < seen.index(nested[4])


Call = tuple[str, str]
"""A function's name and its file."""


def second_call(pipe: StableDiffusionPipeline) -> tuple[list[Call], list[Call]]:
    """The functions of fdcompile that run for the second UNet call of a run, and those under way when a stage runs."""
    seen: list[Call] = []
    chain: list[Call] = []
    count = 0

    def record(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        call = call_of(frame) if event == "call" else None
        if call is not None:
            count += call[0] == "ModuleHook.new_forward"
            if count == 2:
                seen.append(call)
                if call[0] == "ProgramRunner.run":
                    chain[:] = reversed([call for outer in frames(frame) if (call := call_of(outer)) is not None])

    sys.setprofile(record)
    try:
        sample(pipe, steps=6)
    finally:
        sys.setprofile(None)
    return seen, chain


def frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def call_of(frame: FrameType) -> Call | None:
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(ROOT / "fdcompile"):
        return None
    return frame.f_code.co_qualname, path.relative_to(ROOT).as_posix()
