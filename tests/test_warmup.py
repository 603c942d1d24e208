"""Warm up before traffic comes: afterwards nothing is captured or compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import TEXTS, assert_equal, flat_pipe, sample
from torch import fx, nn

import fdcompile
from fdcompile import CaptureError, Config
from fdcompile.backends.eager import EagerBackend
from fdcompile.capture.call import UNetCall
from fdcompile.capture.export import capture
from fdcompile.runtime.graph_cache import GraphCache


class Counting(EagerBackend):
    """Counts what is lowered."""

    def __init__(self) -> None:
        super().__init__()
        self.lowered = 0

    def lower(self, graph_module: Any, name: str) -> Any:
        self.lowered += 1
        return super().lower(graph_module, name)


def test_afterwards_no_call_of_these_sizes_captures_or_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, pipe, twin = Counting(), flat_pipe(), flat_pipe()
    captures: list[Any] = []
    capture = GraphCache.capture
    monkeypatch.setattr(GraphCache, "capture", lambda self, call: captures.append(call) or capture(self, call))
    fdcompile.optimize(pipe, Config(key_steps=3, backend=backend))
    state = torch.get_rng_state()
    fdcompile.warmup(pipe, [(8, 8), (8, 16)], batch=[1, 2], num_inference_steps=6, **TEXTS)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(captures) == 2, "one graph serves both batches"
    lowered = backend.lowered
    fdcompile.optimize(twin, Config(key_steps=3))
    for size in ({}, {"height": 8, "width": 16}):
        for batch in (1, 2):
            assert_equal(sample(pipe, steps=6, batch=batch, **size), sample(twin, steps=6, batch=batch, **size))
    assert (len([call for call in captures if call is not None]), backend.lowered) == (4, lowered), "two are the twin's"


def test_where_the_batch_of_a_graph_is_fixed_each_batch_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with perturbed attention: one size and two batches."""
    captured: list[int] = []

    def fixed(unet: nn.Module, call: UNetCall, symbolic_batch: bool = True, sizes: Any = None) -> fx.GraphModule:
        if symbolic_batch:
            raise CaptureError
        captured.append(call.batch)
        return capture(unet, call, symbolic_batch, sizes)

    monkeypatch.setattr("fdcompile.capture.export.capture", fixed)
    calls: dict[str, Any] = {"sizes": [(8, 8)], "batch": [1, 2], "num_inference_steps": 2, **TEXTS}
    pipe = fdcompile.optimize(flat_pipe(), Config(key_steps="all", cache_size_limit=2))
    fdcompile.warmup(pipe, **calls)
    for batch in (1, 2):
        sample(pipe, steps=2, batch=batch)
    assert captured == [2, 4], "guidance doubles the batch"
    pipe = fdcompile.optimize(flat_pipe(), Config(key_steps="all", cache_size_limit=1))
    with pytest.raises(ValueError, match=r"dropped 1 of the graphs .* one for each size and batch, 2"):
        fdcompile.warmup(pipe, **calls)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([(8, 8), (8, 16)], {}, r"2 sizes: Config\(cache_size_limit=1\) would drop"),
        ([(9, 8)], {}, "divisible by 8 but are 9 and 8"),
        ([(8, 8)], {"strength": 0.5}, "takes no strength"),
    ],
)
def test_bad_input_is_refused_before_anything_is_captured(
    sizes: Any, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = fdcompile.optimize(flat_pipe(), Config.paper(cache_size_limit=1))
    monkeypatch.setattr(GraphCache, "capture", lambda self, call: pytest.fail("captured"))
    with pytest.raises(ValueError, match=message):
        fdcompile.warmup(pipe, sizes, **TEXTS, **options)


@pytest.mark.parametrize(
    ("sizes", "batch"),
    [([], [1]), ((8, 8), [1]), ("8x8", [1]), ([(8, -8)], [1]), ([(8, 8)], []), ([(8, 8)], [0]), ([(8, 8)], 1)],
)
def test_what_is_no_list_of_sizes_or_batches_is_refused(sizes: Any, batch: Any) -> None:
    with pytest.raises(ValueError, match=r"expected a list of (heights and widths in pixels|numbers of images)"):
        fdcompile.warmup(fdcompile.optimize(flat_pipe()), sizes, batch=batch, **TEXTS)


def test_a_stock_pipe_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"call fdcompile\.optimize\(pipe\) first"):
        fdcompile.warmup(flat_pipe(), [(8, 8)], **TEXTS)
