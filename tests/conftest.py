"""Shared fixtures. Capturing a UNet takes seconds, so the tests share one optimised pipe and one captured graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
from diffusers import StableDiffusionPipeline
from models import TEXT, small_pipe, small_unet
from tables import Table
from torch import fx, nn

from fdcompile.capture import UNetCall, capture


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-tables", action="store_true", help="write the tables in docs/ instead of comparing them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every other pipeline only, because the test suite has 20 minutes; `make tables` runs them all."""
    if config.getoption("--write-tables"):
        return
    pipelines = [
        item
        for item in items
        if getattr(item, "originalname", "") == "test_pipeline" and item.path.name == "test_table.py"
    ]
    left_out = set(pipelines[1::2])
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def pipelines_table(request: pytest.FixtureRequest) -> Table:
    intro = """# Pipelines

Made by `make tables` out of the tests, which build each pipeline small, with random weights in its real architecture,
and show of each row: with every step a key step the result equals the stock pipeline's (1e-4 of its largest value,
fp32), decoding in parallel equals decoding step by step, and `restore` brings the stock pipeline back, bit for bit.
*Encoder runs* and *FLOPs* (of the UNet, against stock) are those of the paper's key steps for so many steps. A
ControlNet runs at key steps only. *Stock calls* are UNet calls that cannot be propagated and run the stock UNet."""
    columns = ("pipeline", "class", "UNet", "steps", "encoder runs", "FLOPs of stock", "ControlNet runs", "stock calls")
    return Table("pipelines", intro, columns, request.config.getoption("--write-tables"))


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
