"""A UNet small enough that its graph can be read whole."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, fx, nn

from fdcompile.capture.call import UNetCall
from fdcompile.capture.export import capture


class Resnet(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(2, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(4, channels_out)
        self.dropout = nn.Dropout(0.1)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h: Tensor = self.conv1(nn.functional.silu(self.norm1(x)))
        h = h + self.time_emb_proj(emb)[:, :, None, None]
        return self.conv2(self.dropout(h)) / 1.0


class Toy(nn.Module):
    """conv_in, one encoder block, one decoder block with a skip and text, conv_act, conv_out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time_embedding = nn.Linear(1, 4)
        self.conv_in = nn.Conv2d(2, 4, 3, padding=1)
        self.down_blocks = nn.ModuleList([Resnet(4, 4)])
        self.up_blocks = nn.ModuleList([Resnet(8, 4)])
        self.text = nn.Linear(3, 4)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(4, 2, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        emb = self.time_embedding(timestep.expand(sample.shape[0])[:, None].float())
        skip = self.conv_in(2 * sample - 1.0)
        h = self.down_blocks[0](skip, emb)
        h = self.up_blocks[0](torch.cat([h, skip], dim=1), emb)
        h = h + self.text(encoder_hidden_states)[:, :, None, None]
        return (self.conv_out(self.conv_act(h)),)


DECODER = ("up_blocks", "conv_out")


def toy_call(unet: nn.Module, batch: int = 3) -> UNetCall:
    arguments = {"encoder_hidden_states": torch.randn(batch, 3)}
    positional = (torch.randn(batch, 2, 4, 4), torch.tensor(5))
    return UNetCall.parse(inspect.signature(unet.forward), positional, arguments)


def toy_graph() -> tuple[fx.GraphModule, UNetCall]:
    unet = Toy().eval()
    call = toy_call(unet)
    return capture(unet, call), call


def ops(graph_module: fx.GraphModule) -> list[str]:
    """Names of the operations, in order."""
    nodes = graph_module.graph.nodes
    return [str(node.target).removeprefix("aten.") for node in nodes if node.op == "call_function"]
