"""Progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS = 10
"""Seconds between two lines without a terminal."""


def tell(line: str) -> None:
    """Prints a line on stderr."""
    print(f"  {line}", file=sys.stderr, flush=True)


@contextmanager
def progress_bar(shown: bool = True) -> Iterator[Callable[[str, float | None], None]]:
    """Yields a callback that shows the current work and its share in a bar, or in lines without a terminal."""
    if not shown:
        yield lambda what, done: None
        return
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns()[:3], TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(what: str, done: float | None) -> None:
            bar.update(task, description=what, total=None if done is None else 1.0, completed=done or 0.0)

        yield update


def _lines() -> Callable[[str, float | None], None]:
    last = -float(SECONDS)

    def update(what: str, done: float | None) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS:
            last = time.monotonic()
            tell(what if done is None else f"{what} ({done:.0%})")

    return update
