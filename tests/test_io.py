"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fdcompile.io import atomic_directory, check_free, check_unclaimed


def test_a_folder_that_another_process_writes_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (tmp_path / f".package.partial-{other.pid}-x").mkdir()
        for refuse in (check_free, check_unclaimed):
            with pytest.raises(FileExistsError, match=rf"package is being written by process {other.pid}: wait"):
                refuse(folder)
        check_free(tmp_path / "packages")
        other.communicate(b"\n")
    check_free(folder)  # it has died, and left that behind


def test_a_folder_that_was_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    with pytest.raises(FileExistsError, match="has been filled meanwhile"), atomic_directory(folder) as partial:
        (partial / "mine").touch()
        folder.mkdir()
        (folder / "theirs").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["package", "theirs"]


def test_a_folder_that_is_filled_in_the_last_moment_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "package"
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        folder.mkdir()
        (folder / "theirs").touch()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(FileExistsError, match="was written by another process meanwhile"), atomic_directory(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["theirs"]
