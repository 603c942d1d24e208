"""Checks of paths, and atomic writes of files and directories."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_target(path: Path) -> None:
    """Checks that a file can be written, before the work whose result it receives.

    Raises:
        OSError: the folder of `path` does not exist or is not writable, or `path` is a folder.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(path)!r}: there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder: expected the name of a file")
    _check_writable(path, folder)


def check_folder(path: Path) -> None:
    """Checks that a folder can be created or written to.

    Raises:
        OSError: it cannot.
    """
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{str(path)!r}: {str(there)!r} is no folder that can be written to")
    _check_writable(path, there)


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


def _check_writable(path: Path, folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{str(path)!r}: {str(folder)!r} is no folder that can be written to")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary file that is renamed to `path` at the end of the block, or removed if the block fails."""
    partial = path.with_name(f".partial-{os.getpid()}-{threading.get_ident()}-{path.name}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # must not replace the exception of the block
            partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, values: Any, *, sort_keys: bool = False) -> None:
    """Writes `values` as indented JSON, atomically."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(values, indent=1, sort_keys=sort_keys) + "\n", encoding="utf-8")


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Yields a temporary directory that is renamed to `folder` at the end of the block, or removed if the block fails.

    Raises:
        FileExistsError: `folder` is not empty at the end of the block, or another process is writing it.
    """
    check_unclaimed(folder)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-{os.getpid()}-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} has been filled meanwhile: choose another directory")
        try:
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
        except OSError as error:
            raise FileExistsError(f"{folder} was written by another process meanwhile: choose another one") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_unclaimed(folder: Path) -> None:
    """Checks that no other process is writing `folder` with `atomic_directory`.

    Raises:
        FileExistsError: another process is.
    """
    for partial in folder.parent.glob(f".{folder.name}.partial-*"):
        pid = partial.name.rpartition("partial-")[2].partition("-")[0]
        if pid.isdecimal() and int(pid) != os.getpid() and Path(f"/proc/{pid}").exists():
            raise FileExistsError(f"{folder} is being written by process {pid}: wait for it, or choose another one")
