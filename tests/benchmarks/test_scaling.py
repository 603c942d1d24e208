"""The page on several devices is what its model says."""

from __future__ import annotations

import pytest

from benchmarks.scaling import NVLINK, PAGE, Link, Model, groups, page


def test_the_page_is_up_to_date(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--write-tables"):
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/scaling.md is out of date: make tables"


def test_an_image_takes_its_flops_and_what_is_sent() -> None:
    model = Model("a", stock=0, once=250e12, encoder=250e12, decoder=500e12, prediction=100)
    slow = Link("slow", bandwidth=100, latency=0.5)
    assert model.seconds(1, slow) == 1 + len(groups()) + 2 * sum(groups())
    shared = [-(-steps // 2) for steps in groups()]
    sent = sum(0.5 + steps / 2 for steps in groups() if steps > 1)
    assert model.seconds(2, slow) == 1 + len(groups()) + 2 * sum(shared) + sent
    assert model.seconds(64, NVLINK) > 1 + 3 * len(groups()), "a group decodes one step at least"
