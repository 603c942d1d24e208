"""What the commands share that make many pictures: their processes, their folder, their bar."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import typer


def check_folder(folder: Path) -> Path:
    """Refuses what cannot be made or written to.

    Raises:
        BadParameter: it cannot.
    """
    there = next(own for own in (folder, *folder.absolute().parents) if own.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"{str(folder)!r}: {str(there)!r} is no folder that can be written to")
    return folder


def check_given(folder: Path | None) -> Path | None:
    """Refuses a folder that is to be read and is not there.

    Raises:
        BadParameter: it is not.
    """
    if folder is not None and not folder.is_dir():
        raise typer.BadParameter(f"{str(folder)!r}: there is no such folder")
    return folder


def processes() -> Any:
    """This one and its like, as ``accelerate`` knows them."""
    import torch
    from accelerate import PartialState

    cpu, distributed = not torch.accelerator.is_available(), cast(Any, torch.distributed)
    if not distributed.is_torchelastic_launched():
        return PartialState(cpu=cpu)
    # Processes that a launcher starts again find in its store the addresses of those that died.
    store, rank, count = next(distributed.rendezvous("env://"))
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PartialState(cpu=cpu, store=distributed.PrefixStore(life, store), rank=rank, world_size=count)


@contextmanager
def pictures_bar(shown: bool) -> Iterator[Any]:
    """What is to be told how many pictures are done, and of how many once that is known."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("pictures"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown or not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None, rate="")

        def update(done: int, total: int | None) -> None:
            elapsed = bar.tasks[0].elapsed or 0.0
            bar.update(task, completed=done, total=total, rate=f"{done / elapsed:.2f}/s" if elapsed else "")

        yield update
