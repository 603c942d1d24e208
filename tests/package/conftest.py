"""A package that most tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import TEXTS, flat_pipe

import fdcompile
from fdcompile import Config
from fdcompile.package.manifest import FILE


@pytest.fixture(scope="session")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For one to three images of one size: several sizes take six times as long to export."""
    folder = tmp_path_factory.mktemp("packages") / "onnx"
    pipe = fdcompile.optimize(flat_pipe(), Config.paper())
    return fdcompile.export(pipe, folder, format="onnx", arguments=TEXTS, batch=(1, 1, 3))


@pytest.fixture
def copy(onnx: Path, tmp_path: Path) -> Path:
    """It, for a test to edit or damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in onnx.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest in `folder`."""
    values = json.loads((folder / FILE).read_text())
    change(values)
    (folder / FILE).write_text(json.dumps(values))
