"""Signature and channels of a UNet."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fdcompile.capture.call import UNetCall
from fdcompile.runtime.conditioning import FixedChannels


@dataclass(frozen=True)
class UNetInterface:
    """Parameters of a UNet's forward, and its numbers of input and output channels."""

    parameters: inspect.Signature
    in_channels: int
    out_channels: int

    @classmethod
    def of(cls, unet: nn.Module) -> UNetInterface:
        _, *parameters = inspect.signature(type(unet).forward).parameters.values()
        config = getattr(unet, "config", None)
        in_channels = getattr(config, "in_channels", 0)
        out_channels = getattr(config, "out_channels", in_channels)  # missing in Kandinsky 3, whose numbers are equal
        return cls(inspect.Signature(parameters), in_channels, out_channels)

    def parse(self, args: tuple[Any, ...], kwargs: dict[str, Any], last: UNetCall | None) -> UNetCall:
        """Parses a call; faster if it resembles the `last` one."""
        return UNetCall.parse(self.parameters, args, kwargs, last=last)

    @staticmethod
    def output(call: UNetCall, prediction: Tensor) -> Any:
        """Wraps `prediction` as the forward returns it for `call`."""
        if not call.return_dict:
            return (prediction,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=prediction)

    def fixed_channels(self, sample: Tensor) -> FixedChannels | None:
        """Follows the channels next to the latents in `sample`; None if the UNet predicts all of its input channels."""
        if self.in_channels <= self.out_channels or self.in_channels not in sample.shape[1:3]:
            return None
        return FixedChannels(1 + sample.shape[1:3].index(self.in_channels), self.out_channels)
