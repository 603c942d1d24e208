"""`load` takes the place of what a pipe was optimized or loaded with, or leaves it as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from models import ddim, flat_pipe, sample

import fdcompile
from fdcompile import Config
from fdcompile.pipeline.session import Session, find_session

ALL = Config(key_steps="all")


def sharing(pipe: Any) -> Any:
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    return other


def test_a_failed_load_leaves_what_was_there(onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = fdcompile.optimize(flat_pipe(), ALL)
    session, attach = find_session(pipe), Session.attach

    def fail_once(self: Session) -> None:
        attach(self)
        if self is not session:
            raise RuntimeError("interrupted")

    monkeypatch.setattr(Session, "attach", fail_once)
    with pytest.raises(RuntimeError, match="interrupted"):
        fdcompile.load(pipe, onnx)
    assert find_session(pipe) is session
    sample(pipe, steps=2)
    assert fdcompile.explain(pipe).stock_reasons == {}


def test_pipes_that_share_unet_and_scheduler_are_loaded_together(onnx: Path) -> None:
    pipe = flat_pipe()
    other = sharing(pipe)
    for each in (pipe, other):
        fdcompile.optimize(each, ALL)
    fdcompile.load(pipe, onnx)
    session = find_session(pipe)
    assert session is not None
    assert session.pipes == [pipe, other]
    other.scheduler = pipe.scheduler = DDIMScheduler.from_config(ddim().config)
    sample(other)
    assert find_session(other) is session
    assert fdcompile.explain(other).encoder_runs < 10


def test_a_pipe_that_has_another_scheduler_since_keeps_its_configuration(onnx: Path) -> None:
    pipe = flat_pipe()
    other = sharing(pipe)
    for each in (pipe, other):
        fdcompile.optimize(each, ALL)
    other.scheduler = DDIMScheduler.from_config(ddim().config)
    fdcompile.load(pipe, onnx)
    sample(other)
    assert find_session(other) is not find_session(pipe)
    assert fdcompile.explain(other).key_steps == tuple(range(fdcompile.explain(other).num_steps))
