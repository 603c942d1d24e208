"""Values of tensors that Python code reads, which a graph holds as constants."""

from __future__ import annotations

import ctypes
import random
from collections import UserList
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from capture.toy import Reading, Toy, capture
from torch import Tensor

from fdcompile.errors import CaptureError


class ByValue(Reading):
    """Reads a number out of a tensor, which a graph takes for a constant."""

    def factor(self) -> Any:
        return self.store.item()


@pytest.mark.parametrize("write", [Tensor.fill_, lambda store, value: store.data.fill_(value)], ids=["", "data"])
def test_a_write_to_a_tensor_whose_value_was_read_is_noticed(write: Callable[[Tensor, int], Any]) -> None:
    unet, store = Toy(), torch.zeros(())
    unet.attention.set_processor(ByValue(store))
    graph_cache = capture(unet)
    guards, epoch = graph_cache.guards, graph_cache.guards.epoch
    guards.refresh()
    assert guards.epoch == epoch
    write(store, 2)
    assert guards.changed_within_run()
    guards.refresh()
    assert guards.epoch != epoch


def test_a_write_to_a_tensor_that_the_graph_reads_keeps_the_graph() -> None:
    unet, store = Toy(), torch.zeros(1)
    unet.attention.set_processor(Reading(store))
    graph_cache = capture(unet)
    store.fill_(2)
    epoch = graph_cache.guards.epoch
    graph_cache.guards.refresh()
    assert graph_cache.guards.epoch == epoch


class Drawing(Reading):
    def factor(self) -> Any:
        return self.store()


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["Python", "NumPy"])
def test_random_numbers_of_python_are_refused(draw: Callable[[], float]) -> None:
    unet = Toy()
    unet.attention.set_processor(Drawing(draw))
    with pytest.raises(CaptureError, match="draws random numbers"):
        capture(unet)


class ByDoubledValue(Reading):
    def factor(self) -> Any:
        return (self.store * 2).item()


def test_a_write_to_a_tensor_is_noticed_where_a_value_computed_from_it_was_read() -> None:
    unet, store = Toy(), torch.ones(())
    unet.attention.set_processor(ByDoubledValue(store))
    guards = capture(unet).guards
    epoch = guards.epoch
    store.fill_(2)
    guards.refresh()
    assert guards.epoch != epoch


class InC(Reading):
    """Reads the value of a tensor without a method of the tensor."""

    reads: Any = None

    def factor(self) -> Any:
        return self.reads(self.store)


@pytest.mark.parametrize(
    "reads",
    [
        lambda tensor: torch.full((), tensor),
        lambda tensor: torch.add(torch.zeros(()), torch.ones(()), alpha=tensor),
        lambda tensor: len(torch.arange(tensor)),
        lambda tensor: torch.tensor([tensor, tensor])[0],
        lambda tensor: torch.as_tensor(data=[[tensor]])[0],
        lambda tensor: torch.tensor(UserList([tensor]))[0],
        lambda tensor: torch.ones(1).new_tensor([tensor])[0],
        lambda tensor: len(torch.ones(1).repeat_interleave(tensor.int().reshape(1))),
        lambda tensor: float(str(tensor)[7:-1]),
        lambda tensor: float(np.from_dlpack(tensor)),
        lambda tensor: ctypes.c_float.from_address(tensor.data_ptr()).value,
        lambda tensor: ctypes.c_float.from_address(tensor.untyped_storage().data_ptr()).value,
    ],
    ids=[
        *("full", "alpha", "arange", "tensor", "as_tensor", "sequence", "new_tensor", "repeat_interleave", "str"),
        *("dlpack", "data_ptr", "storage"),
    ],
)
def test_a_write_to_a_tensor_is_noticed_where_its_value_was_read_in_c(reads: Any) -> None:
    unet, store = Toy(), torch.ones(())
    processor = InC(store)
    processor.reads = reads
    unet.attention.set_processor(processor)
    guards = capture(unet).guards
    epoch = guards.epoch
    store.fill_(3)
    guards.refresh()
    assert guards.epoch != epoch


def test_a_sparse_tensor_of_a_processor() -> None:
    unet = Toy()
    processor = InC(torch.ones(1, 1).to_sparse())
    processor.reads = lambda tensor: tensor.to_dense()[0, 0]
    unet.attention.set_processor(processor)
    guards = capture(unet).guards
    guards.refresh()
    assert not guards.changed_within_run()


class Printing(Reading):
    def __call__(self, attention: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        repr(hidden_states)
        output: Tensor = super().__call__(attention, hidden_states, *args, **kwargs)
        return output


def test_a_traced_tensor_that_is_printed_is_no_value_read() -> None:
    unet = Toy()
    unet.attention.set_processor(Printing(torch.zeros(1)))
    guards = capture(unet).guards
    epoch = guards.epoch
    unet.attention.processor.store.fill_(2)
    guards.refresh()
    assert guards.epoch == epoch
