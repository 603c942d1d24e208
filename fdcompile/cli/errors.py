"""Errors that the user can fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer


class UserError(typer.TyperException):
    """An error that the user can fix, as described by the message."""


@contextmanager
def blame_user(*kinds: type[Exception]) -> Iterator[None]:
    """Converts exceptions of `kinds` in the block to `UserError` with the same message."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


@contextmanager
def blame_stop(output: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Like `blame_user`, for work that the same command continues from the files in the folder `output`."""
    try:
        yield
    except kinds as error:
        raise UserError(
            f"stopped: {error}; the files in {output} are complete, and the same command continues"
        ) from error
