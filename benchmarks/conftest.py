"""Options, parametrization and output files of `make bench`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch._inductor

from benchmarks.candidates import candidates
from benchmarks.settings import settings
from benchmarks.speed_report import Results

RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fdcompile")
    group.addoption("--dry", action="store_true", help="run the CUDA rows on a CPU, small and uncompiled")
    group.addoption("--output", type=Path, help="folder for speed.md, speed.json and speed.png")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = Results()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "candidate" in metafunc.fixturenames:
        plan = settings(metafunc.config.getoption("dry"))
        rows = [(setting, candidate) for setting in plan for candidate in candidates(setting)]
        metafunc.parametrize(("setting", "candidate"), rows, ids=str)


@pytest.fixture
def results(pytestconfig: pytest.Config) -> Results:
    return pytestconfig.stash[RESULTS]


@pytest.fixture(autouse=True)
def dry(pytestconfig: pytest.Config) -> Iterator[bool]:
    """Whether this is a dry run, in which compilers are called but return their input."""
    if not pytestconfig.getoption("dry"):
        yield False
        return
    uncompiled = patch.object(torch._inductor, "standalone_compile", lambda graph, inputs: graph)
    with torch.compiler.set_stance("force_eager"), uncompiled:
        yield True


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if not results.rows:
        return
    terminalreporter.write_line("\n" + results.markdown())
    folder = config.getoption("output")
    if folder is not None and exitstatus == pytest.ExitCode.OK:
        results.write(folder)
        terminalreporter.write_line(f"written to {folder}")
