"""Errors that the user can fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
