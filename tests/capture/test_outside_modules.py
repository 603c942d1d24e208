"""Torch modules outside of the UNet that its Python code can reach."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from capture.toy import Reading, Toy, capture
from torch import nn

from fdcompile.capture.guards import user_state
from fdcompile.capture.guards.reach import reach


class OfAModule(Reading):
    def factor(self) -> Any:
        return self.store[0].bias


def test_a_module_that_is_no_part_of_the_unet_is_watched_as_its_parts_are() -> None:
    unet, other = Toy(), nn.Sequential(nn.Linear(1, 1))
    unet.attention.set_processor(OfAModule(other))
    guards = capture(unet).guards
    epoch = guards.epoch
    other[0].bias = nn.Parameter(torch.ones(1))
    assert guards.changed_within_run()
    guards.refresh()
    assert guards.epoch != epoch
    epoch = guards.epoch
    other[0].register_forward_hook(lambda *_: None)
    assert guards.changed_within_run()
    guards.refresh()
    assert guards.epoch != epoch
    epoch = guards.epoch
    other[0].bias.data = torch.zeros(1)
    guards.refresh()
    assert guards.epoch != epoch, "the graph has the old memory"


def test_a_value_read_from_a_module_that_is_no_part_of_the_unet() -> None:
    unet, other = Toy(), nn.Linear(1, 1)
    unet.attention.set_processor(Reading(other))
    unet.attention.processor.factor = lambda: other.bias.item()
    guards = capture(unet).guards
    epoch = guards.epoch
    nn.init.constant_(other.bias, 2)
    assert guards.changed_within_run()
    guards.refresh()
    assert guards.epoch != epoch


class EqualToEqual(nn.Module):
    def __eq__(self, other: object) -> bool:
        return True


def nan() -> nn.Module:
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, math.nan)
    return layer


def sparse() -> nn.Module:
    layer = nn.Linear(1, 1)
    layer.weight = nn.Parameter(torch.ones(1, 1).to_sparse())
    return layer


def hooked() -> nn.Module:
    layer = nn.Linear(1, 1)
    layer.register_forward_hook(lambda *_: None)
    layer.forward = layer.forward  # type: ignore[method-assign]
    return layer


def conjugate() -> nn.Module:
    layer = nn.Identity()
    layer.register_buffer("phase", torch.ones(1, dtype=torch.complex64).conj())
    return layer


def nested() -> nn.Module:
    layer = nn.Identity()
    layer.register_buffer("ragged", torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]))
    return layer


class Unfinished(nn.Module):
    def __init__(self) -> None:
        """Does not call that of its base class."""


@pytest.mark.parametrize(
    "held",
    [
        *(lambda: nn.Linear(1, 1, device="meta"), lambda: torch.jit.script(nn.Linear(1, 1)), EqualToEqual, nan, sparse),
        *(lambda: nn.LazyLinear(1), lambda: MagicMock(spec=nn.Module), hooked, conjugate, nested, Unfinished),
    ],
    ids=["meta", "script", "equal", "nan", "sparse", "lazy", "mock", "hooked", "conjugate", "nested", "unfinished"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_module_that_is_only_held_changes_nothing(held: Callable[[], Any]) -> None:
    unet = Toy()
    unet.attention.set_processor(Reading([0, held()]))
    guards = capture(unet).guards
    epoch = guards.epoch
    guards.declare_values_read()
    guards.refresh()
    assert (guards.unsupported_reason, guards.epoch) == (None, epoch)
    assert user_state(unet)


def test_a_held_module_that_is_offloaded_changes_nothing() -> None:
    unet, held = Toy(), nn.Sequential(nn.Linear(1, 1))
    unet.attention.set_processor(Reading([0, held]))
    guards = capture(unet).guards
    epochs = []
    for _ in range(3):
        add_hook_to_module(held, ModelHook())
        held[0].weight.data = held[0].weight.data.clone()
        guards.refresh()
        epochs.append(guards.epoch)
        remove_hook_from_module(held)
        add_hook_to_module(held, ModelHook())
    assert len({*epochs}) == 1


model = nn.Linear(1, 1)


class OfTheSameName(Reading):
    def factor(self) -> Any:
        return self.model[0]


def test_a_global_with_the_name_of_an_attribute_is_not_read() -> None:
    unet = Toy()
    unet.attention.set_processor(OfTheSameName(None))
    unet.attention.processor.model = [0]
    assert model not in reach([unet]).modules
