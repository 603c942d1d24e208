"""Checks of the directory argument of `export` and `load`."""

from __future__ import annotations

import os
from pathlib import Path

from fdcompile.io import check_unclaimed


def as_path(directory: object, verb: str) -> Path:
    """The argument `directory` of ``fdcompile.<verb>``.

    Raises:
        TypeError: it is not a path, for instance because arguments were swapped.
    """
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(
            f"directory is a {type(directory).__name__}, expected a path: fdcompile.{verb}(pipe, 'directory')"
        )
    return Path(directory)


def check_free(folder: Path) -> None:
    """Checks that the directory can be created.

    Raises:
        FileExistsError: it is not empty, or another process is writing it.
        FileNotFoundError: its parent does not exist.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty: choose another directory")
    check_unclaimed(folder)
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{folder}: there is no folder {str(folder.parent)!r}")
