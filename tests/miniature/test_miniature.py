"""The bundled model is what its card says, and optimizing it keeps its images' content."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fdcompile
from fdcompile import Config
from fdcompile.measure.calls import as_images, seeded
from fdcompile.measure.metrics import Images, psnr
from fdcompile.miniature import GUIDANCE, WEIGHTS
from fdcompile.miniature.checker import number_correct
from fdcompile.miniature.scenes import draw, evaluation_scenes, parse_caption, sample_scene

SCENES = evaluation_scenes(12)
PROMPTS = [scene.caption for scene in SCENES]
COMMON = {"num_inference_steps": 50, "guidance_scale": GUIDANCE}


@cache
def stock_images() -> Images:
    return sample(load(), PROMPTS, **COMMON)


def sample(pipe: Any, prompts: list[str], **common: Any) -> Images:
    return as_images(pipe(**seeded(prompts, 0, **common)).images)


def load() -> Any:
    pipe = fdcompile.load_miniature()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_ships_within_its_limit() -> None:
    assert sum(path.stat().st_size for path in Path(WEIGHTS).rglob("*") if path.is_file()) <= 12e6


def test_is_a_stock_pipeline_with_every_word_a_token() -> None:
    pipe = load()
    assert type(pipe) is diffusers.StableDiffusionPipeline
    caption = "a striped red circle left of a checked blue square on a green background"
    assert len(pipe.tokenizer(caption).input_ids) == len(caption.split()) + 2


@given(st.integers(0, 2**32))
def test_captions_and_scenes_correspond(seed: int) -> None:
    scene = sample_scene(np.random.default_rng(seed))
    assert parse_caption(scene.caption) == scene


@pytest.mark.parametrize("caption", ["", "a cat", "a red circle", "a red circle on a red circle background"])
def test_other_captions_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="not a caption of this grammar"):
        parse_caption(caption)


def test_the_checker_reads_drawn_scenes_and_tells_them_apart() -> None:
    rng = np.random.default_rng(7)
    scenes = [sample_scene(rng) for _ in range(200)]
    images = np.stack([draw(scene, rng) for scene in scenes])
    assert number_correct(images, scenes) >= 194
    assert number_correct(images, scenes[1:] + scenes[:1]) <= 10


def test_every_step_key_gives_the_stock_images() -> None:
    common = COMMON | {"num_inference_steps": 10}
    pipe = fdcompile.optimize(load(), Config(key_steps="all"))
    assert psnr(sample(pipe, PROMPTS[:2], **common), sample(load(), PROMPTS[:2], **common)).min() > 50


def test_key_steps_lose_no_content_grossly() -> None:
    pipe = fdcompile.optimize(load(), Config.paper())
    images = sample(pipe, PROMPTS, **COMMON)
    report = fdcompile.explain(pipe)
    assert (report.encoder_runs, report.decoder_evaluations) == (9, 50)
    assert number_correct(images, SCENES) >= number_correct(stock_images(), SCENES) - 0.15 * len(SCENES)
    assert number_correct(images, SCENES[1:] + SCENES[:1]) <= 0.1 * len(SCENES), "another prompt's image"
