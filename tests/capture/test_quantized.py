"""Quantized weights: as plain tensors of a module, and as a class of tensors that is made of others, as torchao's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Float8Linear, assert_equal, flat_pipe, sample
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fdcompile
from fdcompile import Config
from fdcompile.capture.guards import checksum_of


class Quantized(Tensor):
    """Int8 with a scale for each row; any operation on it is one on its values."""

    numbers: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scales: Tensor) -> Quantized:
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scales.dtype, device=numbers.device)

    def __init__(self, numbers: Tensor, scales: Tensor) -> None:
        self.numbers, self.scales = numbers, scales

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Quantized:
        return cls(**inner)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(func(args[0].numbers), func(args[0].scales))
        values = pytree.tree_map_only(cls, lambda tensor: tensor.numbers.to(tensor.scales.dtype) * tensor.scales, args)
        return func(*values, **(kwargs or {}))


def quantized(linear: nn.Linear) -> Tensor:
    scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    return Quantized((linear.weight.detach() / scales).round().to(torch.int8), scales)


def as_subclass(embedding: nn.Module) -> None:
    for linear in embedding.children():
        if isinstance(linear, nn.Linear):
            linear.weight = nn.Parameter(quantized(linear), requires_grad=False)


def as_float8(embedding: Any) -> None:
    embedding.linear_1, embedding.linear_2 = Float8Linear(embedding.linear_1), Float8Linear(embedding.linear_2)


@pytest.mark.filterwarnings("ignore:stage .* runs step by step")
@pytest.mark.parametrize("quantize", [as_subclass, as_float8])
def test_a_quantized_time_embedding(quantize: Callable[[Any], None]) -> None:
    pipe, stock = flat_pipe(), flat_pipe()
    for each in (pipe, stock):
        quantize(each.unet.time_embedding)
    fdcompile.optimize(pipe, Config(key_steps="all"))
    assert_equal(sample(pipe, steps=4), sample(stock, steps=4))
    assert not fdcompile.explain(pipe).stock_reasons
    for each in (pipe, stock):
        weight = each.unet.time_embedding.linear_1.weight
        getattr(weight, "numbers", weight).detach().view(torch.int8).bitwise_xor_(3)
    assert_equal(sample(pipe, steps=4), sample(stock, steps=4))


def test_checksums_of_quantized_weights_tell_of_each_of_their_tensors() -> None:
    weight = quantized(nn.Linear(8, 4))
    before = checksum_of([weight])
    weight.scales[2] += 1
    assert checksum_of([weight]) != before
