"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(names: Sequence[str], *rows: Sequence[str]) -> str:
    """Formats names of columns, and rows of as many cells, as a Markdown table."""
    head, *lines = (f"| {' | '.join(cells)} |" for cells in (names, *rows))
    return "\n".join([head, f"|{'---|' * len(names)}", *lines])
