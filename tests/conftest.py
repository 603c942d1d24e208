"""Shared fixtures. Capturing a UNet takes seconds, so the tests share one optimized pipe and one captured graph."""

from __future__ import annotations

import gc
import inspect
import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import StableDiffusionPipeline
from models import TEXT, THREE_LEVELS, small_pipe, small_unet
from tables import Table
from torch import fx, nn
from traced_once import traced_once

from fdcompile import DECODER, key_steps
from fdcompile.capture.call import UNetCall
from fdcompile.capture.export import capture
from fdcompile.capture.guards import support
from fdcompile.graph.program import StagedProgram
from fdcompile.passes import run_passes
from fdcompile.passes.driver import VERIFY_VARIABLE

__all__ = ["traced_once"]

os.environ[VERIFY_VARIABLE] = "1"  # in the processes that tests start, too


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-tables", action="store_true", help="write the tables in docs/ instead of comparing them")
    parser.addoption("--accept", action="store_true", help="write golden files instead of comparing them")


def pytest_collection_finish() -> None:
    """Tracing makes many objects: without this, a sixth of the time is spent on collecting garbage among imports."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with the file ``golden/<name>.txt`` beside the test; `pytest --accept` writes it."""

    def check(name: str, text: str) -> None:
        path = request.path.parent / "golden" / f"{name}.txt"
        if request.config.getoption("--accept"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{text}\n", encoding="utf-8")
        expected = path.read_text(encoding="utf-8") if path.exists() else ""
        assert f"{text}\n" == expected, f"not what {path.name} says: pytest --accept, if it is meant, and read the diff"

    return check


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts also where these tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def pipelines_table(request: pytest.FixtureRequest) -> Table:
    intro = """# Pipelines

`make tables` generates this page from the tests. They build a small version of each pipeline, with random weights in
its real architecture, and verify for each row: if every step is a key step, the result equals that of the stock
pipeline (1e-4 of its largest value, fp32); parallel decoding equals decoding step by step; both also hold with a linear
forecast; and `restore` restores the stock pipeline bit for bit. *Encoder runs* and *FLOPs* (of the UNet, relative to
stock) are those of the paper's key steps for this number of steps. *Forecast* is the number of groups of steps whose
features were held although a linear forecast was configured, because the conditioning changed or a step ran stock. *By
default* is the number of encoder runs with the default: half of the steps (the minimum of seven key steps is lifted
here, because the runs are short). A ControlNet runs at key steps only. *Stock calls* are UNet calls that cannot be
propagated and run the stock UNet."""
    columns = (
        "pipeline",
        "class",
        "UNet",
        "steps",
        "encoder runs",
        "FLOPs of stock",
        "forecast",
        "by default",
        "ControlNet runs",
        "stock calls",
    )
    return Table("pipelines", intro, columns, request.config.getoption("--write-tables"))


@pytest.fixture(scope="session")
def schedulers_table(request: pytest.FixtureRequest) -> Table:
    intro = """# Schedulers

`make tables` generates this page from the tests: every scheduler class of diffusers in a Stable Diffusion pipeline with
7 steps. *Equal*: if every step is a key step, the latents equal the stock latents (1e-4 of the largest value, fp32). If
the stock pipeline fails with a scheduler, a custom sampling loop is tested; if that also fails, the row says so.
*Amplifies rounding*: in the stock pipeline as well, predictions that are rounded differently (by 1e-7) change the
latents (by 1e-5); these samplers may differ by ten times that in addition. *By default*, half of the steps are key
steps (the minimum of seven is lifted here, because the runs are short), or all for the given reason; the latents are
then those of stock."""
    columns = ("scheduler", "equal", "UNet calls", "encoder runs, every third step a key step", "by default", "why all")
    return Table("schedulers", intro, columns, request.config.getoption("--write-tables"))


@pytest.fixture(scope="session")
def tensorrt_table(request: pytest.FixtureRequest) -> Table:
    intro = """# TensorRT, dry run

`make tables` generates this page from the tests: torch-tensorrt 2.13 converts every stage, up to the point where
TensorRT's builder would take over, on a CPU. The UNets have their real architecture, but are narrow, and most have two
levels; *all layers* marks UNets with as many levels, blocks and layers as the real one, with one transformer layer
where SDXL has several. *Operations* are those of the lowered graph, *unsupported* those without a converter, and
*engines* the partitions that would be built; nothing is left to torch. *Latents*, *steps* and *height, width* (in
latents, if one engine serves several) are the smallest and largest sizes of the profile. The lowered graphs were run on
the CPU at the smallest, usual and largest sizes, and equal the stages (1e-4). TensorRT engines have not been built;
those of [TensorRT for RTX](tensorrt_rtx.md) have."""
    columns = ("model: stage", "operations", "unsupported", "engines", "latents", "steps", "height, width")
    return Table("tensorrt", intro, columns, request.config.getoption("--write-tables"))


@pytest.fixture(scope="session")
def stock() -> StableDiffusionPipeline:
    """The twin of `pipe` that is never optimized."""
    return small_pipe()


@pytest.fixture(scope="session")
def _shared_pipe() -> StableDiffusionPipeline:
    return small_pipe()


@pytest.fixture
def pipe(_shared_pipe: StableDiffusionPipeline) -> Iterator[StableDiffusionPipeline]:
    """A pipe to optimize. Tests leave it optimized, because a replaced configuration keeps what was captured."""
    scheduler = _shared_pipe.scheduler
    yield _shared_pipe
    _shared_pipe.scheduler = scheduler


@pytest.fixture(scope="session")
def unet() -> nn.Module:
    """Of three levels, so that a cut may leave some of them out on either side."""
    return small_unet(**THREE_LEVELS)


@pytest.fixture(scope="session")
def staged(captured: fx.GraphModule) -> StagedProgram:
    """The stages of `captured`, with the default cut and all passes."""
    return run_passes(captured, DECODER)


@pytest.fixture(scope="session")
def captured(unet: nn.Module) -> fx.GraphModule:
    """The small UNet's graph. Passes work on copies."""
    arguments = {"encoder_hidden_states": torch.randn(4, *TEXT)}
    call = UNetCall.parse(inspect.signature(unet.forward), (torch.randn(4, 4, 8, 8), torch.tensor(7)), arguments)
    return capture(unet, call)


@pytest.fixture
def modes_observe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modes of a test count as such that only look, so that a pipe does not run stock under them."""
    monkeypatch.setattr(support, "_OBSERVERS", (*support._OBSERVERS, "test_", "device_reads"))


@pytest.fixture(scope="module")
def few_key_steps_suffice() -> Iterator[None]:
    """Short runs, which are cheap, reuse by default, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_steps, "FEWEST_KEY_STEPS", 1)
        yield
