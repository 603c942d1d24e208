"""The memory a run needs is predicted, and the steps decoded at once follow from it."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from models import sample
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fdcompile
from fdcompile import Config
from fdcompile.graph.flops import shapes
from fdcompile.graph.memory import live_bytes, most_steps, weight_bytes
from fdcompile.passes import batch_steps, run_passes
from fdcompile.pipeline.session import find_session


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_of(t)._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = storage_of(tensor)
                if storage._cdata not in self._known | given:
                    self._add(storage)
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: Any) -> None:
        size, key = storage.nbytes(), storage._cdata
        self.now += size
        self._known.add(key)

        def gone() -> None:
            self.now -= size
            self._known.discard(key)

        weakref.finalize(storage, gone)


def storage_of(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_live_bytes_of_a_known_graph(steps: int) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    exp = graph.call_function(torch.ops.aten.exp.default, (x,))
    both = graph.call_function(torch.ops.aten.cat.default, ([exp, x],))
    view = graph.call_function(torch.ops.aten.reshape.default, (both, [-1]))
    total = graph.call_function(torch.ops.aten.sum.default, (view,))
    graph.output((total,))
    tensor = torch.randn(steps, 100)
    unit = 400 * steps
    # x; x, exp; x, exp, both (twice as large); x, both (and its view); x, both, the sum
    expected = [unit, 2 * unit, 4 * unit, 3 * unit, 3 * unit + 4]
    assert live_bytes(fx.GraphModule({}, graph), shapes([tensor]))[: len(expected)] == expected


def test_profiles_of_one_and_two_steps_predict_all_others(captured: fx.GraphModule) -> None:
    decoder = run_passes(captured, fdcompile.DECODER).stages["decoder"]
    batched = batch_steps(decoder)
    one, two, seven = (live_bytes(batched, decoder.input_shapes(2, steps)) for steps in (1, 2, 7))
    assert [first + 6 * (second - first) for first, second in zip(one, two, strict=True)] == seven
    assert most_steps(one, two, max(seven)) == 7
    assert most_steps(one, two, max(seven) - 1) == 6
    assert most_steps(one, two, 0) == 1


def test_weights_are_counted_once(captured: fx.GraphModule, unet: Any) -> None:
    assert weight_bytes(captured) == sum(p.numel() * p.element_size() for p in unet.parameters())


@pytest.mark.usefixtures("modes_observe")
@pytest.mark.parametrize(("budget", "forecast"), [(0.15, "hold"), (0.6, "hold"), (0.6, "linear")])
def test_auto_stays_within_its_budget_and_makes_the_same_latents(
    pipe: Any, stock: Any, budget: float, forecast: Any
) -> None:
    """Bytes alive in a real run, weights included: parallel against sequential and against the stock pipe."""
    weights = sum(p.numel() * p.element_size() for p in pipe.unet.parameters())
    arguments = {"steps": 20, "batch": 2}

    def run(one: Any) -> tuple[Tensor, int]:
        sample(one, **arguments)
        with LiveBytes() as live:
            latents = sample(one, **arguments)
        return latents, weights + live.peak

    _, stock_bytes = run(stock)
    fdcompile.optimize(pipe, Config.paper(max_parallel_steps=1, forecast=forecast))
    sequential, sequential_bytes = run(pipe)
    fdcompile.optimize(pipe, Config.paper(memory_budget=budget, forecast=forecast))
    parallel, parallel_bytes = run(pipe)
    torch.testing.assert_close(parallel, sequential, rtol=1e-4, atol=1e-5)
    report = fdcompile.explain(pipe)
    assert parallel_bytes <= (1 + budget) * max(sequential_bytes, stock_bytes)
    assert (report.decoder_calls < report.decoder_evaluations) == (budget > 0.5)


def test_on_a_device_that_says_how_much_is_free_half_of_it_is_used(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fdcompile.optimize(pipe, Config(key_steps=10))
    sample(pipe, steps=10)
    session: Any = find_session(pipe)
    ((runner),) = session.executor.runner_cache.runners.values()
    decoder, stage = runner._batched["decoder"], runner.program.stages["decoder"]
    four = max(live_bytes(decoder, stage.input_shapes(2, 4)))
    monkeypatch.setattr("fdcompile.runtime.compiled_runner.free_bytes", lambda device: 2 * four)
    runner.reconfigure(Config.paper())
    assert runner.max_steps(2) == (4, "no more fit into half of the memory that was free")
    monkeypatch.setattr("fdcompile.runtime.compiled_runner.free_bytes", lambda device: four)
    runner.reconfigure(Config.paper(memory_budget=10.0))
    assert runner.max_steps(2)[0] == 4, "a fraction allows no more than is free"
    monkeypatch.undo()
    runner.reconfigure(Config.paper(memory_budget=10.0))
    assert runner.max_steps(2)[0] > 4
