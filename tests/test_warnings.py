"""A warning shows the user's line, whatever libraries lie between it and ours."""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from models import TEXT, TEXTS, small_pipe

import fdcompile
from fdcompile.config import Config
from fdcompile.errors import warn_user


def call_pipeline(pipe: Any) -> None:
    pipe(**TEXTS, num_inference_steps=3, output_type="latent")  # the user's line


def call_in_a_thread(pipe: Any) -> None:
    with ThreadPoolExecutor() as pool:
        pool.submit(lambda: call_pipeline(pipe)).result()


@torch.no_grad()
def loop(pipe: Any) -> None:
    pipe.scheduler.set_timesteps(3)
    pipe.unet(torch.zeros(1, 4, 8, 8), pipe.scheduler.timesteps[0], torch.zeros(1, *TEXT))  # the user's line


@pytest.mark.parametrize("use", [call_pipeline, call_in_a_thread, loop])
def test_a_warning_in_a_run_shows_the_users_line(use: Callable[[Any], None]) -> None:
    pipe = fdcompile.optimize(small_pipe(), Config())
    with pytest.warns(UserWarning, match="3 steps: every step is a key step") as caught:
        use(pipe)
    (warning,) = caught
    assert warning.filename == __file__
    assert "# the user's line" in linecache.getline(warning.filename, warning.lineno)


def test_without_a_line_of_the_users_the_outermost_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdcompile.errors._libraries", lambda: ("",))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_user("everything belongs to a library")
    assert len(caught) == 1
    assert caught[0].filename != __file__
