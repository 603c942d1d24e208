"""The walkthrough is what the code does today."""

from __future__ import annotations

import pytest
from tables import DOCS
from walkthrough import page


def test_the_walkthrough_is_up_to_date(request: pytest.FixtureRequest) -> None:
    path, text = DOCS / "walkthrough.md", page()
    if request.config.getoption("--write-tables"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, "docs/walkthrough.md is out of date: make tables"
