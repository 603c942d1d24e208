"""The trained test beds: they load, and run as other pipelines do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fdcompile
from benchmarks.testbeds import TESTBEDS, load_testbed
from fdcompile import Config

CLASSES = [0, 1]


def images(pipe: Any, guidance: float) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    images = pipe(CLASSES, num_inference_steps=6, guidance_scale=guidance, generator=generator, output_type="np").images
    assert isinstance(images, np.ndarray)
    return images


@pytest.mark.parametrize("name", TESTBEDS)
def test_with_key_steps_only_it_draws_what_stock_draws(name: str) -> None:
    stock = images(load_testbed(name), 3.0)
    optimized = fdcompile.optimize(load_testbed(name), Config(key_steps="all", backend="eager"))
    np.testing.assert_allclose(images(optimized, 3.0), stock, atol=1e-5)


def test_guidance_and_the_class_matter() -> None:
    pipe = load_testbed("digits")
    first, guided = images(pipe, 1.0), images(pipe, 5.0)
    assert first.shape == (len(CLASSES), 8, 8, 1)
    assert np.abs(first - guided).max() > 0.05
