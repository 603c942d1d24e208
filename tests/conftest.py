"""Shared fixtures. Capturing a UNet takes seconds, so the tests share one optimised pipe and one captured graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
from diffusers import StableDiffusionPipeline
from models import TEXT, small_pipe, small_unet
from torch import fx, nn

from fdcompile.capture import UNetCall, capture


@pytest.fixture(scope="session")
def stock() -> StableDiffusionPipeline:
    """The twin of `pipe` that is never optimised."""
    return small_pipe()


@pytest.fixture(scope="session")
def _shared_pipe() -> StableDiffusionPipeline:
    return small_pipe()


@pytest.fixture
def pipe(_shared_pipe: StableDiffusionPipeline) -> Iterator[StableDiffusionPipeline]:
    """A pipe to optimise. Tests leave it optimised, because a replaced configuration keeps what was captured."""
    scheduler = _shared_pipe.scheduler
    yield _shared_pipe
    _shared_pipe.scheduler = scheduler


@pytest.fixture(scope="session")
def unet() -> nn.Module:
    return small_unet()


@pytest.fixture(scope="session")
def captured(unet: nn.Module) -> fx.GraphModule:
    """The small UNet's graph. Passes work on copies."""
    arguments = {"encoder_hidden_states": torch.randn(4, *TEXT)}
    call = UNetCall.parse(inspect.signature(unet.forward), (torch.randn(4, 4, 8, 8), torch.tensor(7)), arguments)
    return capture(unet, call)
