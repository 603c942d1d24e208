"""A capture works however the UNet was made; where it does not, the error says what to do about that cause."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture.toy import Toy, capture
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from models import FLAT, assert_equal, flat_pipe, sample, small_unet
from torch import Tensor, nn

import fdcompile
from fdcompile import Config
from fdcompile.errors import CaptureError

ALL = Config(key_steps="all")


def test_weights_made_in_inference_mode_are_captured_outside_of_it() -> None:
    stock, pipe = flat_pipe(), flat_pipe()
    with torch.inference_mode():
        pipe.register_modules(unet=small_unet(**FLAT))
    fdcompile.optimize(pipe, ALL)
    assert_equal(sample(pipe, steps=4), sample(stock, steps=4))
    assert not fdcompile.explain(pipe).stock_reasons


@pytest.mark.parametrize("name", ["attention.to_q.weight", "attention.to_out.0.bias"])
def test_one_inference_tensor_among_the_weights(name: str) -> None:
    unet = Toy()
    with torch.inference_mode():
        weight = nn.Parameter(unet.get_parameter(name).clone())
    path, _, last = name.rpartition(".")
    setattr(unet.get_submodule(path), last, weight)
    capture(unet)


def test_weights_lent_for_a_call_run_stock() -> None:
    pipe, stock = flat_pipe(), flat_pipe()
    fdcompile.optimize(pipe, ALL)
    lent = {name: 2 * weight.detach() for name, weight in pipe.unet.named_parameters()}
    text = torch.zeros(1, 7, 32)

    def loop(caller: Any, weights: dict[str, Tensor]) -> Tensor:
        caller.scheduler.set_timesteps(4)
        latents = torch.ones(1, 4, 8, 8)
        with torch.no_grad():
            for timestep in caller.scheduler.timesteps:
                arguments = (latents, timestep, text)
                noise = torch.func.functional_call(caller.unet, weights, arguments)[0]
                latents = caller.scheduler.step(noise, timestep, latents).prev_sample
        return latents

    assert_equal(loop(pipe, lent), loop(stock, lent))
    (reason,) = fdcompile.explain(pipe).stock_reasons
    assert "torch.func.functional_call" in reason
    assert_equal(loop(pipe, {}), loop(stock, {}))
    assert not fdcompile.explain(pipe).stock_reasons


class Asking(AttnProcessor2_0):
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().__call__(*args, **kwargs)
        return output if output.sum() > 0 else -output


class AskingModule(Attention):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().forward(*args, **kwargs)
        return output if output.sum() > 0 else -output


def test_only_an_attention_processor_is_advised_about_as_one() -> None:
    unet = Toy()
    unet.attention.set_processor(Asking())
    with pytest.raises(CaptureError, match="Use an attention processor there"):
        capture(unet)
    unet = Toy()
    unet.attention.__class__ = AskingModule
    with pytest.raises(CaptureError, match="Use a AskingModule there"):
        capture(unet)


def test_weights_that_export_refuses_are_named() -> None:
    unet = Toy()
    unet.attention.to_q._parameters["weight"] = unet.attention.to_q.weight.detach()
    with pytest.raises(CaptureError, match="Its weights may be at fault") as caught:
        capture(unet)
    assert "processor" not in str(caught.value)
