"""Tables in docs/ that tests make: a row is written with `--write-tables`, and otherwise compared."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


class Table:
    """A Markdown table whose rows are known by their first cell; `intro` stands above it."""

    def __init__(self, name: str, intro: str, columns: tuple[str, ...], write: bool) -> None:
        self.path = DOCS / f"{name}.md"
        self._head = f"{intro}\n\n{_line(columns)}{_line(('---',) * len(columns))}"
        self._write = write

    def check(self, *cells: str) -> None:
        """Compares the row with the one in the document, or replaces it there."""
        rows = self._rows()
        if not self._write:
            assert rows.get(cells[0]) == _line(cells), f"{self.path.name} is out of date: make tables"
            return
        rows[cells[0]] = _line(cells)
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(self._head + "".join(rows.values()))

    def keep(self, names: list[str]) -> None:
        """The document has these rows and no others, in this order."""
        rows = self._rows()
        if self._write and rows.keys() >= set(names):
            self.path.write_text(self._head + "".join(rows[name] for name in names))
            rows = self._rows()
        assert list(rows) == names, f"{self.path.name} is out of date: delete it and make tables"

    def _rows(self) -> dict[str, str]:
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        rows = [line for line in lines if line.startswith("|")][2:]
        return {row.split("|")[1].strip(): row for row in rows}


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |\n"
