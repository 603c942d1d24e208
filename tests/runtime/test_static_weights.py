"""What follows from weights alone: dense parts, made again when a run begins, and kernels laid out channels-last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import assert_equal, flat_pipe, sample
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import fdcompile
from fdcompile import Config
from fdcompile.backends.aot_inductor import layout_of
from fdcompile.backends.eager import EagerBackend
from fdcompile.graph.weights import WeightSlice, is_channels_last
from fdcompile.pipeline.session import find_session
from fdcompile.runtime.graph_cache import GraphCache
from fdcompile.runtime.layout import channels_last, restore_layout, to_channels_last
from fdcompile.runtime.static_weights import StaticWeights


class Keeping(EagerBackend):
    """Keeps the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def lower(self, graph_module: fx.GraphModule, name: str) -> Any:
        self.graphs.append(graph_module)
        return graph_module


def static_weights(pipe: Any) -> StaticWeights:
    session: Any = find_session(pipe)
    weights: StaticWeights = session.executor.runner_cache.graph_cache.static_weights
    return weights


def test_no_call_slices_a_weight_and_programs_share_the_parts() -> None:
    backend, pipe = Keeping(), flat_pipe()
    fdcompile.optimize(pipe, Config(key_steps=3, backend=backend))
    sample(pipe, steps=4)
    sliced = [
        node
        for graph in backend.graphs
        for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor)
        if node.args[0].op == "get_attr"
    ]
    assert not sliced
    parts = len(static_weights(pipe)._parts)
    assert parts == 8, "halves of two convolutions, a shortcut, and a norm's weight and bias"
    sample(pipe, steps=4, height=8, width=16)
    assert len(static_weights(pipe)._parts) == parts, "another size reads the same ones"


def test_weights_written_or_moved_between_runs_count_at_once() -> None:
    pipe, stock = flat_pipe(), flat_pipe()
    config = Config(key_steps="all")
    fdcompile.optimize(pipe, config)
    with torch.inference_mode():  # parts made here may be written to outside
        sample(pipe, steps=2)
    for each in (pipe, stock):
        for weight in each.unet.parameters():
            weight.data *= 1.1  # as PEFT fuses an adapter
    assert_equal(sample(pipe, steps=2), sample(stock, steps=2))
    address = [part.data_ptr() for part in static_weights(pipe)._parts]
    sample(pipe, steps=2)
    assert [part.data_ptr() for part in static_weights(pipe)._parts] == address, "CUDA graphs read them there"
    for each in (pipe, stock):
        each.unet.to(torch.float64)
    inputs = {name: torch.zeros(1, 7, 32, dtype=torch.float64) for name in ("prompt_embeds", "negative_prompt_embeds")}
    assert_equal(sample(pipe, steps=2, **inputs), sample(stock, steps=2, **inputs))


def test_kernels_are_turned_in_place_and_back() -> None:
    unet = flat_pipe().unet
    kernel, pixel = unet.conv_in.weight, unet.down_blocks[0].attentions[0].proj_in.weight
    values, strides = kernel.clone(), pixel.stride()
    to_channels_last(unet)
    assert unet.conv_in.weight is kernel
    assert torch.equal(kernel, values)
    assert kernel.stride() == (36, 1, 12, 4)
    assert (strides, pixel.stride()) == ((8, 1, 1, 1), (8, 1, 8, 8))
    addresses = [kernel.data_ptr(), pixel.data_ptr()]
    to_channels_last(unet)
    assert [kernel.data_ptr(), pixel.data_ptr()] == addresses
    assert WeightSlice("", 1, 0, 4).of(pixel).stride() == (4, 1, 4, 4)
    restore_layout(unet)
    assert kernel.is_contiguous()
    assert torch.equal(kernel, values)


class Watching(EagerBackend):
    """Notes the layout of what convolutions return."""

    def __init__(self) -> None:
        self.channels_last: list[bool] = []

    def lower(self, graph_module: fx.GraphModule, name: str) -> Any:
        noted = self.channels_last

        class Run(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if n.target is torch.ops.aten.conv2d.default:
                    noted.append(result.is_contiguous(memory_format=torch.channels_last))
                return result

        return lambda *arguments: Run(graph_module).run(*arguments)


def test_an_export_leaves_a_stock_pipe_s_layout_as_it_was() -> None:
    unet = flat_pipe().unet
    for restore in (True, False):
        with pytest.raises(RuntimeError, match="fails"), channels_last(unet, restore=restore):
            assert is_channels_last(unet.conv_in.weight)
            raise RuntimeError("fails")
        assert is_channels_last(unet.conv_in.weight) != restore


def test_turned_kernels_make_every_convolution_channels_last_and_restore_turns_them_back() -> None:
    """As on CUDA, where capture turns them."""
    pipe, backend = flat_pipe(), Watching()
    fdcompile.optimize(pipe, Config(key_steps=3, backend=backend))
    to_channels_last(pipe.unet)
    with torch.no_grad():
        sample(pipe, steps=4)
    assert backend.channels_last
    assert all(backend.channels_last)
    fdcompile.restore(pipe)
    assert pipe.unet.conv_in.weight.is_contiguous()


def test_turned_kernels_are_no_change_of_the_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where they are turned within the run that captures, so that the next one must not capture again."""
    pipe = flat_pipe()
    fdcompile.optimize(pipe, Config(key_steps=3))
    capture = GraphCache.capture

    def turned_capture(self: GraphCache, *args: Any) -> Any:
        to_channels_last(self.unet)
        self.guards.rebase()
        return capture(self, *args)

    monkeypatch.setattr(GraphCache, "capture", turned_capture)
    sample(pipe, steps=4)
    assert "capture" in fdcompile.explain(pipe).compile_seconds
    sample(pipe, steps=4)
    assert not fdcompile.explain(pipe).compile_seconds


def test_packages_on_cuda_take_four_dimensions_channels_last() -> None:
    with FakeTensorMode():
        features, steps = torch.empty(2, 4, 8, 8, device="cuda"), torch.empty(3, 2, 4, 8, 8, device="cuda")
        assert layout_of(features) is torch.channels_last
        assert layout_of(steps) is torch.contiguous_format
        assert layout_of(torch.empty(2, 4, 8, 8)) is torch.contiguous_format
