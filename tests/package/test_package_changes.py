"""What a package has baked in and what of the UNet has changed: answered right, by the stock UNet, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from models import TEXTS, flat_pipe, sample
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import fdcompile
from fdcompile import PackageError

CPU = torch.device("cpu")
STRENGTH = 1.0


class Scaled(AttnProcessor2_0):
    """An attention processor with a tensor that is no parameter of a module."""

    def __init__(self, scale: float = 1.5) -> None:
        super().__init__()
        self.scale = torch.tensor([scale])
        self.gain = np.ones(1)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().__call__(*args, **kwargs) * self.scale * STRENGTH * float(self.gain[0])


def scaled_pipe(scale: float = 1.5) -> Any:
    pipe = flat_pipe()
    pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.set_processor(Scaled(scale))
    return pipe


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of `scaled_pipe`."""
    folder = tmp_path_factory.mktemp("packages") / "scaled"
    return fdcompile.export(scaled_pipe(), folder, format="onnx", arguments=TEXTS)


def check_refused_or_stock(change: Callable[[Any], Any], package: Path, message: str) -> None:
    """After `change` a package raises, or the stock UNet answers and says why."""
    pipe = fdcompile.load(scaled_pipe(), package)
    sample(pipe, steps=2)
    change(pipe.unet)
    with pytest.raises(PackageError, match=message):
        sample(pipe, steps=2)
    fdcompile.restore(pipe)
    check_stock(pipe, fdcompile.load(scaled_pipe(), package, fallback="stock"), change, message)


def check_stock(stock: Any, pipe: Any, change: Callable[[Any], Any], message: str) -> None:
    """After `change`, `pipe` draws what `stock` does, which was changed alike, and says why."""
    change(pipe.unet)
    assert torch.equal(sample(pipe, steps=2), sample(stock, steps=2))
    assert any(message in reason for reason in fdcompile.explain(pipe).stock_reasons)


def test_a_tensor_that_a_processor_holds_is_in_the_package(scaled: Path) -> None:
    pipe, twin = fdcompile.load(scaled_pipe(), scaled), fdcompile.optimize(scaled_pipe())
    torch.testing.assert_close(sample(pipe), sample(twin), rtol=0, atol=1e-3)


def test_another_tensor_on_a_processor_is_refused_at_load_and_later(scaled: Path) -> None:
    with pytest.raises(PackageError, match=r"attn1\.processor\.scale"):
        fdcompile.load(scaled_pipe(3.0), scaled)
    pipe = fdcompile.load(scaled_pipe(), scaled)
    sample(pipe, steps=2)
    pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor.scale.fill_(3)
    with pytest.raises(PackageError, match=r"attn1\.processor\.scale"):
        sample(pipe, steps=2)


def test_another_array_on_a_processor_is_refused(scaled: Path) -> None:
    pipe = fdcompile.load(scaled_pipe(), scaled)
    sample(pipe, steps=2)
    pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor.gain[0] = 3
    with pytest.raises(PackageError, match=r"attn1\.processor\.gain"):
        sample(pipe, steps=2)
    with pytest.raises(PackageError, match=r"attn1\.processor\.gain"):
        fdcompile.load(pipe, scaled)


def test_another_global_that_a_processor_reads_is_refused(scaled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.STRENGTH", 2.0)
    with pytest.raises(PackageError, match="STRENGTH"):
        fdcompile.load(scaled_pipe(), scaled)


def test_a_processor_with_other_code_is_refused(scaled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return AttnProcessor2_0.__call__(self, *args, **kwargs) * self.scale * 2

    monkeypatch.setattr(Scaled, "__call__", twice)
    with pytest.raises(PackageError, match="Scaled"):
        fdcompile.load(scaled_pipe(), scaled)


def permute(weight: nn.Parameter) -> None:
    weight.data = weight.data.flip(0).contiguous()


WRITES: dict[str, Callable[[Any], Any]] = {
    "negated": lambda unet: unet.conv_in.weight.data.neg_(),
    "rows in another order": lambda unet: permute(unet.time_embedding.linear_1.weight),
    "two values exchanged": lambda unet: (
        unet.down_blocks[0]
        .resnets[0]
        .time_emb_proj.weight.data[0, :2]
        .copy_(unet.down_blocks[0].resnets[0].time_emb_proj.weight.data[0, :2].flip(0))
    ),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_keeps_the_norm_is_noticed(write: str, scaled: Path) -> None:
    check_refused_or_stock(WRITES[write], scaled, "weights have changed since the package was loaded")


def quantize(linear: nn.Linear) -> None:
    """As torchao does: the weight becomes a tensor made of others."""
    weight = linear.weight.detach()
    linear.weight = nn.Parameter(TwoTensor(weight.clone(), weight.clone()), requires_grad=False)


QUANTISED: dict[str, Callable[[Any], Any]] = {
    "tensor of tensors": lambda unet: quantize(unet.time_embedding.linear_1),
    "in attention": lambda unet: quantize(unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q),
}


@pytest.mark.parametrize("part", QUANTISED)
def test_weights_quantized_after_load_are_noticed(part: str, scaled: Path) -> None:
    check_refused_or_stock(QUANTISED[part], scaled, "weights have changed since the package was loaded")


@pytest.mark.parametrize("part", QUANTISED)
def test_quantized_weights_are_refused_at_load(part: str, scaled: Path) -> None:
    pipe = scaled_pipe()
    QUANTISED[part](pipe.unet)
    with pytest.raises(PackageError, match="weights: the package has"):
        fdcompile.load(pipe, scaled)


MANAGED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "layerwise casting": (
        lambda unet: unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32),
        "layerwise_casting",
    ),
    "blocks offloaded": (
        lambda unet: [accelerate.cpu_offload(block, CPU) for block in unet.down_blocks],
        "offloaded one by one",
    ),
}


@pytest.mark.parametrize("kind", MANAGED)
def test_a_unet_whose_weights_are_managed_is_refused_at_load_and_runs_stock_later(kind: str, scaled: Path) -> None:
    manage, message = MANAGED[kind]
    stock = scaled_pipe()
    manage(stock.unet)
    for fallback in ("raise", "stock"):
        with pytest.raises(PackageError, match=message):
            fdcompile.load(stock, scaled, fallback=fallback)
        pipe = fdcompile.load(scaled_pipe(), scaled, fallback=fallback)
        sample(pipe, steps=2)
        check_stock(stock, pipe, manage, message)
