"""The examples do what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import ArrayLike
from PIL import Image

import fdcompile
from examples import prompt_to_prompt


def distance(one: ArrayLike, other: ArrayLike) -> float:
    """Mean over all pixels, of 255."""
    return float(np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).mean())


@pytest.mark.tables
def test_prompt_to_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The edited image is closer to its source than the new prompt's own, and optimized it is the stock one."""
    drawn = []
    draw = prompt_to_prompt.draw
    monkeypatch.setattr(
        prompt_to_prompt, "draw", lambda *args, **kwargs: drawn.append(draw(*args, **kwargs)) or drawn[-1]
    )
    reports = []
    explain = fdcompile.explain
    monkeypatch.setattr(fdcompile, "explain", lambda pipe: reports.append(explain(pipe)) or reports[-1])
    sheet = tmp_path / "edited.png"
    monkeypatch.setattr(sys, "argv", ["prompt_to_prompt.py", str(sheet)])
    prompt_to_prompt.main()

    (source, unrelated), (_, stock), (_, optimized) = drawn
    assert distance(stock, source) < distance(unrelated, source) / 2
    assert distance(optimized, stock) < distance(unrelated, source) / 10
    (report,) = reports
    assert report.forced_key_steps == (prompt_to_prompt.SELF_UNTIL, prompt_to_prompt.CROSS_UNTIL)
    assert report.stock_reasons == {}
    assert Image.open(sheet).size == (680, 190)


def test_prompt_to_prompt_equals_stock_where_every_step_is_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_to_prompt, "STEPS", 10)
    shares = {"cross_until": 8, "self_until": 4}
    pipe = fdcompile.load_miniature()
    pipe.unet.set_attn_processor(prompt_to_prompt.EditedAttention())
    expected = prompt_to_prompt.draw(pipe, **shares)
    fdcompile.optimize(pipe, fdcompile.Config(key_steps="all"))
    for actual, image in zip(prompt_to_prompt.draw(pipe, **shares), expected, strict=True):
        assert np.abs(np.asarray(actual, int) - np.asarray(image, int)).max() <= 1
