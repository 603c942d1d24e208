"""split_skips: the split halves add up, and what cannot be proved stays."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from toy import ops

import fdcompile
from fdcompile.capture.call import UNetCall
from fdcompile.capture.export import capture
from fdcompile.graph.text import graph_text
from fdcompile.passes import OPTIONAL_PASSES, PASSES, run_passes
from fdcompile.passes.bind import bind
from fdcompile.passes.simplify import simplify
from fdcompile.passes.split_skips import split_skips

CUT = ("up_blocks", "conv_out")


class Up(nn.Module):
    """What a decoder resnet does to ``cat(h, skip)``: 8 + 4 channels in 4 groups of 3, and a 1x1 shortcut."""

    def __init__(self, activation: nn.Module, groups: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.time = nn.Linear(1, 8)
        self.norm = nn.GroupNorm(groups, 12)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.activation = activation
        self.conv = nn.Conv2d(12, 4, 3, padding=1, bias=bias)
        self.shortcut = nn.Conv2d(12, 4, 1)

    def forward(self, h: Tensor, skip: Tensor, t: Tensor) -> Tensor:
        x = torch.cat([h + self.time(t)[:, :, None, None], skip], dim=1)
        return self.conv(self.activation(self.norm(x))) + self.shortcut(x)


class UNet(nn.Module):
    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(2, 4, 1)
        self.mid_block = nn.Conv2d(4, 8, 1)
        self.up_blocks = nn.ModuleList([up])
        self.conv_out = nn.Conv2d(4, 2, 1)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        skip = self.conv_in(sample)
        h = self.up_blocks[0](self.mid_block(skip), skip, timestep[:, None].to(sample.dtype) / 1000)
        return (self.conv_out(h),)


def bound(
    up: nn.Module, cut: tuple[str, ...] = CUT, dtype: torch.dtype = torch.float32
) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    unet = UNet(up).eval().to(dtype)
    sample = torch.randn(3, 2, 16, 16, dtype=dtype)
    call = UNetCall.parse(inspect.signature(unet.forward), (sample, torch.tensor(500)), {})
    graph_module = capture(unet, call)
    simplify(graph_module)
    bind(graph_module, cut)
    return graph_module, call.tensors


def test_golden(golden: Any) -> None:
    graph_module, inputs = bound(Up(nn.SiLU()))
    expected = graph_module(*inputs)[0]
    assert ops(graph_module)[-7:] == [
        *("cat.default", "group_norm.default", "silu.default", "conv2d.default"),
        *("conv2d.default", "add.Tensor", "conv2d.default"),
    ]
    assert split_skips(graph_module, CUT)
    golden("split_skips", graph_text(graph_module))
    torch.testing.assert_close(graph_module(*inputs)[0], expected)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(), nn.Mish(), nn.LeakyReLU(0.2)])
@pytest.mark.parametrize(("groups", "bias"), [(6, True), (12, False), (3, True)])
def test_other_activations_and_group_sizes(activation: nn.Module, groups: int, bias: bool) -> None:
    graph_module, inputs = bound(Up(activation, groups, bias))
    expected = graph_module(*inputs)[0]
    assert split_skips(graph_module, CUT)
    torch.testing.assert_close(graph_module(*inputs)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [nn.Softmax(dim=1), nn.Sequential(nn.SiLU(), nn.Tanh())])
def test_behind_what_is_not_known_to_be_pointwise_only_the_shortcut_splits(activation: nn.Module) -> None:
    graph_module, _ = bound(Up(activation))
    convolutions = ops(graph_module).count("conv2d.default")
    assert split_skips(graph_module, CUT)
    assert ops(graph_module).count("group_norm.default") == 1
    assert ops(graph_module).count("conv2d.default") == convolutions + 1


def test_a_linear_shortcut_splits() -> None:
    class Linear(Up):
        def forward(self, h: Tensor, skip: Tensor, t: Tensor) -> Tensor:
            h = h + self.time(t)[:, :, None, None]
            x = torch.cat([h.movedim(1, -1), skip.movedim(1, -1)], dim=-1)
            return nn.functional.linear(x, self.shortcut.weight[:, :, 0, 0], self.shortcut.bias).movedim(-1, 1)

    graph_module, inputs = bound(Linear(nn.SiLU()))
    expected = graph_module(*inputs)[0]
    linears = ops(graph_module).count("linear.default")
    assert split_skips(graph_module, CUT)
    assert ops(graph_module).count("linear.default") == linears + 1
    torch.testing.assert_close(graph_module(*inputs)[0], expected)


def test_a_temporal_convolution_splits() -> None:
    class Temporal(Up):
        def __init__(self) -> None:
            super().__init__(nn.SiLU())
            self.conv = nn.Conv3d(12, 4, (3, 1, 1), padding=(1, 0, 0))

        def forward(self, h: Tensor, skip: Tensor, t: Tensor) -> Tensor:
            x = torch.cat([h + self.time(t)[:, :, None, None], skip], dim=1)[:, :, None].expand(-1, -1, 2, -1, -1)
            return self.conv(self.activation(self.norm(x))).mean(2)

    class Stacked(Temporal):
        def forward(self, h: Tensor, skip: Tensor, t: Tensor) -> Tensor:
            frames = [(half[:, :, None] * torch.ones(2, 1, 1)) for half in (h + self.time(t)[:, :, None, None], skip)]
            return self.conv(self.activation(self.norm(torch.cat(frames, dim=1)))).mean(2)

    graph_module, inputs = bound(Stacked())
    expected = graph_module(*inputs)[0]
    assert split_skips(graph_module, CUT)
    assert ops(graph_module).count("conv3d.default") == 2
    torch.testing.assert_close(graph_module(*inputs)[0], expected)
    graph_module, _ = bound(Temporal())
    assert not split_skips(graph_module, CUT), "what is done to the concatenation first is not known to split"


def test_one_group_over_all_channels_cannot_be_split() -> None:
    graph_module, _ = bound(Up(nn.SiLU(), groups=1))
    split_skips(graph_module, CUT)
    assert ops(graph_module).count("group_norm.default") == 1


@pytest.mark.parametrize("cut", [(), ("conv_in", "mid_block", *CUT)])
def test_no_change_where_both_halves_are_known_together(cut: tuple[str, ...]) -> None:
    graph_module, _ = bound(Up(nn.SiLU()), cut)
    before = str(graph_module.graph)
    assert not split_skips(graph_module, cut)
    assert str(graph_module.graph) == before


def test_no_change_the_second_time() -> None:
    graph_module, _ = bound(Up(nn.SiLU()))
    assert split_skips(graph_module, CUT)
    assert not split_skips(graph_module, CUT)


@pytest.mark.parametrize("cut", [fdcompile.DECODER, fdcompile.PARTIAL_ENCODER, fdcompile.deep_feature_caching(3)])
def test_moves_work_of_a_real_unet_out_of_the_steps(captured: fx.GraphModule, cut: tuple[str, ...]) -> None:
    off = run_passes(captured, cut, tuple(step for step in PASSES if step.name not in OPTIONAL_PASSES))
    on = run_passes(captured, cut)
    per_step = [sum(p.stages[n].flops(2) for n in p.stages if n in ("shallow", "decoder")) for p in (on, off)]
    total = [sum(stage.flops(2) for stage in p.stages.values()) for p in (on, off)]
    assert per_step[0] < 0.97 * per_step[1]
    assert total[0] == total[1], "work is moved, not added"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_not_further_from_the_truth(dtype: torch.dtype) -> None:
    graph_module, (sample, timestep) = bound(Up(nn.SiLU(), groups=3).to(dtype), dtype=dtype)
    stock = graph_module(sample, timestep)[0]
    assert split_skips(graph_module, CUT)
    split = graph_module(sample, timestep)[0]
    exact, _ = bound(Up(nn.SiLU(), groups=3).double(), dtype=torch.float64)
    exact.load_state_dict({name: value.double() for name, value in graph_module.state_dict().items()})
    truth = exact(sample.double(), timestep)[0]
    assert split.dtype == dtype
    assert (split - truth).square().mean() <= 1.5 * (stock - truth).square().mean()
