"""Errors that the user can put right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


class UserError(typer.TyperException):
    """Something the user can put right; the message says what."""


@contextmanager
def blame_user(*kinds: type[Exception]) -> Iterator[None]:
    """Makes what is raised in the block, if it is of one of `kinds`, a `UserError` with the same message."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error
