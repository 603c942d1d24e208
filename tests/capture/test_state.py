"""State of a UNet: whatever a call of it changes, wherever Python code reaches. A graph has none."""

from __future__ import annotations

import argparse
import array
import collections
import contextlib
import contextvars
import copy
import ctypes
import enum
import functools
import importlib
import inspect
import itertools
import math
import operator
import random
import sys
import threading
import types
import weakref
from collections import UserDict, UserList
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from fdcompile.capture.call import UNetCall
from fdcompile.capture.export import StatefulError
from fdcompile.capture.guards import Guards, user_state
from fdcompile.capture.guards.reach import reach
from fdcompile.errors import CaptureError
from fdcompile.runtime.graph_cache import GraphCache


class Toy(nn.Module):
    """Takes what a UNet takes, and holds one attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(4, heads=1, dim_head=4)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        tokens = self.attention(sample.flatten(2).transpose(1, 2))
        return (sample + timestep.reshape(-1, 1, 1, 1) * tokens.transpose(1, 2).reshape(sample.shape),)


def call() -> UNetCall:
    tensors = torch.randn(2, 4, 4, 4), torch.tensor(7.0)
    return UNetCall.parse(inspect.signature(Toy().forward), tensors, {"encoder_hidden_states": torch.randn(2, 3, 4)})


def capture(unet: nn.Module) -> GraphCache:
    graph_cache = GraphCache(unet)
    graph_cache.follow_unet()
    graph_cache.capture(call())
    return graph_cache


class Counter:
    def __init__(self) -> None:
        self.n = 0


class InAnObject(AttnProcessor2_0):
    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.counter.n += 1
        return super().__call__(*args, **kwargs) * (1 + 0.1 * self.counter.n)


class Deeper(AttnProcessor2_0):
    def __init__(self) -> None:
        super().__init__()
        self.store = {"counters": [Counter()]}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.store["counters"][0].n += 1
        return super().__call__(*args, **kwargs) * (1 + 0.1 * self.store["counters"][0].n)


class OnItsClass(AttnProcessor2_0):
    n = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        type(self).n += 1
        return super().__call__(*args, **kwargs) * (1 + 0.1 * self.n)


class Keeping(AttnProcessor2_0):
    """An attention store."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.maps.append(super().__call__(*args, **kwargs))
        return self.maps[-1] * (1 + 0.1 * len(self.maps))


class InATensor(AttnProcessor2_0):
    def __init__(self) -> None:
        super().__init__()
        self.count = torch.zeros(())

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.count.add_(1)
        return super().__call__(*args, **kwargs) * (1 + 0.1 * self.count)


class InAnArray(AttnProcessor2_0):
    def __init__(self) -> None:
        super().__init__()
        self.counts = np.zeros(1)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.counts += 1
        return super().__call__(*args, **kwargs) * (1 + 0.1 * float(self.counts[0]))


def in_a_closure() -> Callable[..., Tensor]:
    n = 0

    def processor(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal n
        n += 1
        return AttnProcessor2_0()(*args, **kwargs) * (1 + 0.1 * n)

    return processor


GLOBAL = Counter()


def in_a_global() -> Callable[..., Tensor]:
    GLOBAL.n = 0

    def processor(*args: Any, **kwargs: Any) -> Tensor:
        GLOBAL.n += 1
        return AttnProcessor2_0()(*args, **kwargs) * (1 + 0.1 * GLOBAL.n)

    return processor


class MadeAtItsFirstCall(AttnProcessor2_0):
    """What changes is not there before."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.counter = vars(self).get("counter") or Counter()
        self.counter.n += 1
        return super().__call__(*args, **kwargs) * (1 + 0.1 * self.counter.n)


class OfItsFirstCall(AttnProcessor2_0):
    """As a feature cache does."""

    first: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().__call__(*args, **kwargs)
        if self.first is None:
            self.first = output
        return output + 0.1 * self.first


class InAModule(Attention):
    """A part of the UNet, not a processor."""

    n = 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.n += 1
        return super().forward(*args, **kwargs) * (1 + 0.1 * self.n)


class CachingModule(Attention):
    cache: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().forward(*args, **kwargs)
        self.cache = output if self.cache is None else self.cache * 0.5 + output * 0.5
        return output + 0.1 * self.cache


class InANamespace(AttnProcessor2_0):
    def __init__(self) -> None:
        super().__init__()
        self.store = types.SimpleNamespace(n=0)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.store.n += 1
        return super().__call__(*args, **kwargs) * (1 + 0.1 * self.store.n)


STATEFUL = [InANamespace, InAnObject, Deeper, OnItsClass, Keeping, InATensor, InAnArray, in_a_closure, in_a_global]
STATEFUL += [MadeAtItsFirstCall, OfItsFirstCall]


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_processor_that_changes_something_at_each_call_has_state(kind: Callable[[], Any]) -> None:
    unet = Toy()
    unet.attention.set_processor(kind())
    with pytest.raises(StatefulError):
        capture(unet)
    assert (OnItsClass.n, GLOBAL.n) == (0, 0), "what a trace has changed is put back"


@pytest.mark.parametrize("kind", [InAModule, CachingModule])
def test_a_part_that_changes_something_of_its_own_has_state(kind: type) -> None:
    unet = Toy()
    unet.attention.__class__ = kind
    graph_cache = GraphCache(unet)
    graph_cache.follow_unet()
    with pytest.raises(StatefulError):
        graph_cache.capture(call())
    assert (
        graph_cache.guards.unsupported_reason
        == "its modules or attention processors keep values from one call to the next"
    )
    assert not {"n", "cache"} & vars(unet.attention).keys()


class Lazy(AttnProcessor2_0):
    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.settings:
            self.settings.update(scale=0.5, kept=Counter())
        return super().__call__(*args, **kwargs) * self.settings["scale"]


def test_what_is_only_made_at_the_first_call_is_no_state() -> None:
    unet = Toy()
    unet.attention.set_processor(Lazy())
    assert capture(unet).guards.unsupported_reason is None
    assert unet.attention.processor.settings == {}


class Reading(AttnProcessor2_0):
    """Scales by what is in `store`."""

    def __init__(self, store: Any) -> None:
        super().__init__()
        self.store = store

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().__call__(*args, **kwargs) * (1 + self.factor())

    def factor(self) -> Any:
        return self.store[0]

    def write(self, value: int) -> None:
        self.store[0] = value


class ReadingAnObject(Reading):
    def factor(self) -> Any:
        return self.store.n

    def write(self, value: int) -> None:
        self.store.n = value


class ReadingAnArrayAsATensor(Reading):
    def factor(self) -> Any:
        return torch.from_numpy(self.store)


class Elsewhere(Reading):
    """Reads with a function."""

    def __init__(self, read: Callable[[], Any]) -> None:
        super().__init__(None)
        self.read = read

    def factor(self) -> Any:
        return self.read()


class Attributes(dict[str, Any]):
    """As many configurations are."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class ByProperty(Reading):
    @property
    def current(self) -> Any:
        return GLOBAL.n

    def factor(self) -> Any:
        return self.current


class ByIndex(Reading):
    def __getitem__(self, index: int) -> Any:
        return GLOBAL.n

    def factor(self) -> Any:
        return self[0]


@dataclass
class Setting:
    n: int = field(compare=False)


settings = sys.modules.setdefault("settings_of_a_user", types.ModuleType("settings_of_a_user"))
settings.inner = types.ModuleType("settings_of_a_user.inner")  # type: ignore[attr-defined]

Written = tuple[Reading, Callable[[int], Any]]
"""A processor, and what writes to what it reads, which the processor does not refer to."""


def in_attributes(store: Any, read: Callable[[], Any] | None = None) -> Written:
    store.n = 0
    return Elsewhere(read or (lambda: store.n)), functools.partial(setattr, store, "n")


def in_items(store: Any, readable: Any = None) -> Written:
    store["n"] = 0
    readable = store if readable is None else readable
    return Elsewhere(lambda: readable["n"]), functools.partial(operator.setitem, store, "n")


def in_a_proxy() -> Written:
    store: dict[str, Any] = {}
    return in_items(store, types.MappingProxyType(store))


def in_a_weak_reference() -> Written:
    reference = weakref.ref(GLOBAL)
    return in_attributes(GLOBAL, lambda: reference().n)  # type: ignore[union-attr]


def in_an_imported_module() -> Written:
    sys.modules["not_installed"] = None  # type: ignore[assignment]

    def read() -> Any:
        if GLOBAL.n > 100:
            import not_installed  # type: ignore[import-not-found]  # noqa: F401
        from settings_of_a_user import n  # type: ignore[import-not-found]

        return n

    return in_attributes(settings, read)


def in_a_default() -> Written:
    store = {"n": 0}

    def read(store: dict[str, Any] = store) -> Any:
        return store["n"]

    return Elsewhere(read), functools.partial(operator.setitem, store, "n")


def in_another_default() -> Written:
    def read(n: int = 0) -> Any:
        return n

    return Elsewhere(read), lambda value: setattr(read, "__defaults__", (value,))


def in_a_function() -> Written:
    def read() -> Any:
        return read.n  # type: ignore[attr-defined]

    return in_attributes(read, read)


def in_executed_code() -> Written:
    names: dict[str, Any] = {"n": 0, "__name__": "executed"}
    exec("def read():\n    return n", names)
    return Elsewhere(names["read"]), functools.partial(operator.setitem, names, "n")


def in_a_decorator() -> Written:
    @functools.wraps(torch.nn.functional.relu)
    def read() -> Any:
        return GLOBAL.n

    return in_attributes(GLOBAL, read)


def in_a_cached_function() -> Written:
    @functools.lru_cache
    def read() -> Any:
        return GLOBAL.n

    return in_attributes(GLOBAL, read)


def in_an_equal_object() -> Written:
    processor = ReadingAnObject(Setting(0))
    return processor, lambda value: setattr(processor, "store", Setting(value))


def in_a_proxy_of_an_object() -> Written:
    proxy = weakref.proxy(GLOBAL)
    return in_attributes(GLOBAL, lambda: proxy.n)


def in_weak_values() -> Written:
    store = weakref.WeakValueDictionary(counter=GLOBAL)
    return in_attributes(GLOBAL, lambda: store["counter"].n)


def in_keys(kind: Any) -> Written:
    store = kind([GLOBAL]) if kind is weakref.WeakSet else kind({GLOBAL: None})
    return in_attributes(GLOBAL, lambda: next(iter(store)).n)


def in_an_array_of_objects() -> Written:
    store = np.array([GLOBAL, None])
    return in_attributes(GLOBAL, lambda: store[0].n)


def in_a_structured_array() -> Written:
    store = np.zeros(1, dtype=[("weight", "f4"), ("counter", object)])
    store["counter"][0] = GLOBAL
    return in_attributes(GLOBAL, lambda: store["counter"][0].n)


def in_a_held_module_of_python() -> Written:
    settings.n = 0  # type: ignore[attr-defined]
    return ReadingAnObject(settings), functools.partial(setattr, settings, "n")


def in_a_chain() -> Written:
    store = {"n": 0}
    return in_items(store, collections.ChainMap(store))


def in_a_method_of_a_dict() -> Written:
    store = {"n": 0}
    get = store.get
    return Elsewhere(lambda: get("n")), functools.partial(operator.setitem, store, "n")


class Named(NamedTuple):
    unused: int

    def read(self) -> Any:
        return GLOBAL.n


def in_a_method_of_a_tuple() -> Written:
    store = Named(0)
    return in_attributes(GLOBAL, lambda: store.read())


def in_a_module() -> Written:
    """That is no part of the UNet."""
    store = nn.Sequential(nn.Linear(1, 1))
    return in_attributes(store[0], lambda: store[0].n)


def in_a_list_in_a_list() -> Written:
    store = [Counter(), [0]]
    return Elsewhere(lambda: store[1][0]), functools.partial(operator.setitem, store[1], 0)  # type: ignore


ELSEWHERE: dict[str, Callable[[], Written]] = {
    "namespace": lambda: in_attributes(types.SimpleNamespace()),
    "arguments": lambda: in_attributes(argparse.Namespace()),
    "thread": lambda: in_attributes(threading.local()),
    "user's dict": lambda: in_items(UserDict()),
    "subclass of dict": lambda: in_items(Attributes()),
    "counter": lambda: in_items(collections.Counter()),
    "proxy": in_a_proxy,
    "weak reference": in_a_weak_reference,
    "weak proxy": in_a_proxy_of_an_object,
    "weak values": in_weak_values,
    "weak keys": lambda: in_keys(weakref.WeakKeyDictionary),
    "weak set": lambda: in_keys(weakref.WeakSet),
    "keys": lambda: in_keys(dict),
    "array of objects": in_an_array_of_objects,
    "structured array": in_a_structured_array,
    "held module": in_a_held_module_of_python,
    "chain": in_a_chain,
    "method of a dict": in_a_method_of_a_dict,
    "method of a tuple": in_a_method_of_a_tuple,
    "torch module": in_a_module,
    "list in a list": in_a_list_in_a_list,
    "property": lambda: (ByProperty(None), functools.partial(setattr, GLOBAL, "n")),
    "index": lambda: (ByIndex(None), functools.partial(setattr, GLOBAL, "n")),
    "equal object": in_an_equal_object,
    "module": lambda: in_attributes(settings, lambda: settings.n),
    "module in a module": lambda: in_attributes(settings.inner, lambda: settings.inner.n),
    "imported module": in_an_imported_module,
    "default": in_a_default,
    "another default": in_another_default,
    "function": in_a_function,
    "executed code": in_executed_code,
    "decorator": in_a_decorator,
    "cached function": in_a_cached_function,
}

READINGS: dict[str, Callable[[], Reading]] = {
    "object": lambda: ReadingAnObject(Counter()),
    "list": lambda: Reading([0]),
    "NumPy": lambda: Reading(np.zeros(1)),
    "NumPy as a tensor": lambda: ReadingAnArrayAsATensor(np.zeros(1, dtype=np.float32)),
    "array": lambda: Reading(array.array("d", [0.0])),
    "bytes": lambda: Reading(bytearray(1)),
}


def closure_over(tensor: Tensor) -> tuple[Any, Callable[[Tensor], None]]:
    def processor(attention: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states * tensor

    def replace(other: Tensor) -> None:
        nonlocal tensor
        tensor = other

    return processor, replace


@pytest.mark.parametrize("kind", ["list", "object", "closure"])
def test_a_tensor_that_is_replaced_by_an_equal_one_is_noticed(kind: str) -> None:
    """Later writes go to the new tensor. Only tensors of one element compare as equal."""
    zero = torch.zeros(())
    if kind == "list":
        processor: Any = Reading([zero])
        replace: Callable[[Tensor], None] = functools.partial(operator.setitem, processor.store, 0)
    elif kind == "object":
        processor = Reading(None)
        replace = functools.partial(setattr, processor, "store")
        replace(zero)
    else:
        processor, replace = closure_over(zero)
    unet = Toy()
    unet.attention.processor = processor
    guards = Guards(unet)
    guards.refresh()
    assert not guards.changed_within_run()
    replace(torch.zeros(()))
    assert guards.changed_within_run()


@pytest.mark.parametrize("kind", [*READINGS, *ELSEWHERE])
def test_a_write_to_what_a_processor_reads_is_noticed(kind: str) -> None:
    unet, GLOBAL.n = Toy(), 0
    if kind in READINGS:
        processor = READINGS[kind]()
        write: Callable[[int], Any] = processor.write
    else:
        processor, write = ELSEWHERE[kind]()
    unet.attention.set_processor(processor)
    guards = capture(unet).guards
    guards.refresh()
    epoch = guards.epoch
    write(2)
    assert guards.changed_within_run()
    guards.refresh()
    assert guards.epoch != epoch
    if kind == "equal object":
        return
    write(0)
    guards.refresh()
    assert guards.epoch == epoch, "undone"


@pytest.mark.parametrize(
    "store",
    [
        *(itertools.count(), itertools.cycle([1.0, 1.5]), iter([0, 1]), random.Random(0), np.random.default_rng(0)),
        *(contextvars.ContextVar("n", default=0), ctypes.c_int(0)),
    ],
    ids=lambda store: type(store).__name__,
)
def test_what_cannot_be_compared_makes_the_unet_run_stock(store: Any) -> None:
    unet = Toy()
    unet.attention.set_processor(Reading(store))
    guards = Guards(unet)
    guards.refresh()
    assert guards.unsupported_reason is not None
    assert f"a {type(store).__name__}" in guards.unsupported_reason


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


def test_an_address_that_is_used_again_is_no_old_state() -> None:
    unet = Toy()
    unet.attention.set_processor(Reading(None))
    processor, guards = unet.attention.processor, Guards(unet)
    epochs = []
    for number in range(40):
        processor.store = np.float32(number)  # the memory of the one before the last is free
        guards.refresh()
        epochs.append(guards.epoch)
    assert len({*epochs}) == len(epochs)


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


class EqualToAll:
    def __init__(self, n: float) -> None:
        self.n = n

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EqualToAll)

    def __hash__(self) -> int:
        return 0


@pytest.mark.parametrize(
    "hold",
    [
        lambda value: (value,),
        lambda value: [value],
        lambda value: {"n": (value,)},
        lambda value: frozenset([value]),
        lambda value: collections.deque([value]),
        lambda value: collections.OrderedDict(n=value),
    ],
    ids=["tuple", "list", "dict", "frozenset", "deque", "ordered-dict"],
)
def test_an_equal_container_with_another_object_is_a_change(hold: Any) -> None:
    unet, processor = Toy(), Reading(None)
    processor.store = [hold(EqualToAll(1.0))]
    unet.attention.set_processor(processor)
    guards = Guards(unet)
    guards.refresh()
    processor.store[0] = hold(EqualToAll(2.0))
    assert guards.changed_within_run()


class ReadOnly(dict[str, Any]):
    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError("read-only")

    update = __delitem__ = __setitem__  # type: ignore[assignment]


@pytest.mark.parametrize("store", [collections.Counter(n=5), ReadOnly(n=5)], ids=["counter", "read-only"])
def test_what_a_capture_counts_in_a_dict_is_put_back(store: Any) -> None:
    unet, processor = Toy(), Reading(None)
    processor.store, kept = store, dict(store)
    processor.factor = lambda: dict.__setitem__(store, "n", store["n"] + 1) or 0  # type: ignore[func-returns-value, method-assign]
    unet.attention.set_processor(processor)
    with pytest.raises(StatefulError):
        capture(unet)
    assert dict(store) == kept


def test_a_list_that_contains_itself_is_watched() -> None:
    store: list[Any] = [0]
    store.append(store)
    unet = Toy()
    unet.attention.set_processor(Reading(store))
    guards = capture(unet).guards
    store[0] = 2
    assert guards.changed_within_run()


def test_an_object_that_cannot_be_compared_has_changed() -> None:
    class Odd:
        n = 0

        def __eq__(self, other: object) -> bool:
            raise TypeError("no comparison")

        __hash__ = object.__hash__

    unet = Toy()
    processor = ReadingAnObject(Odd())
    unet.attention.set_processor(processor)
    guards = Guards(unet)
    guards.refresh()
    processor.store = Odd()
    assert guards.changed_within_run()


class WithSlots:
    __slots__ = ("__private", "n")

    def read(self) -> Any:
        return getattr(self, "n", 0) + getattr(self, "_WithSlots__private", 0)

    def keep(self, value: Any) -> None:
        self.__private = value


SLOTS, UNUSED = WithSlots(), nn.Identity()


class OfAClass(Reading):
    def factor(self) -> Any:
        return getattr(type(self), "kept", 0)


class OfAnAttention(Reading):
    def factor(self) -> Any:
        return getattr(UNUSED, "kept", 0)


class OfASlot(Reading):
    def factor(self) -> Any:
        return SLOTS.read()


class OfAGlobal(Reading):
    def factor(self) -> Any:
        try:
            return kept_by_a_call  # type: ignore[name-defined]
        except NameError:
            return 0


class Kept:
    """A name that does not exist before it is set."""

    def __init__(self, reader: type, *place: Any) -> None:
        self.reader = reader
        self.owner, self.name = place

    def set(self, value: Any) -> None:
        setattr(self.owner, self.name, value)

    def exists(self) -> bool:
        return hasattr(self.owner, self.name)

    def remove(self) -> None:
        if self.exists():
            delattr(self.owner, self.name)


KEPT = {
    "class": Kept(OfAClass, OfAClass, "kept"),
    "base class": Kept(OfAClass, Reading, "kept"),
    "library's class": Kept(OfAClass, AttnProcessor2_0, "kept"),
    "slot": Kept(OfASlot, SLOTS, "n"),
    "private slot": Kept(OfASlot, SLOTS, "_WithSlots__private"),
    "class of all modules": Kept(OfAnAttention, nn.Module, "kept"),
    "global": Kept(OfAGlobal, sys.modules[__name__], "kept_by_a_call"),
}


@pytest.fixture(params=KEPT)
def kept(request: pytest.FixtureRequest) -> Iterator[Kept]:
    place = KEPT[request.param]
    yield place
    place.remove()


def test_a_name_that_is_new_is_noticed(kept: Kept) -> None:
    unet = Toy()
    unet.attention.set_processor(kept.reader(None))
    guards = Guards(unet)
    guards.refresh()
    epoch = guards.epoch
    kept.set(2)
    assert guards.changed_within_run()
    guards.refresh()
    assert guards.epoch != epoch
    kept.remove()
    guards.refresh()
    assert guards.epoch == epoch, "undone"


@pytest.mark.parametrize("value", ["number", "tensor"])
def test_a_name_that_the_first_call_makes_is_removed(kept: Kept, value: str) -> None:
    """A traced tensor left behind would make the stock UNet fail."""

    class Making(kept.reader):  # type: ignore[misc, name-defined]
        def __call__(self, attention: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not kept.exists():
                kept.set(2 if value == "number" else hidden_states.mean())
            output: Tensor = super().__call__(attention, hidden_states, *args, **kwargs)
            return output

    unet = Toy()
    unet.attention.set_processor(Making(None))
    with contextlib.nullcontext() if value == "number" else pytest.raises(StatefulError):
        capture(unet)
    assert not kept.exists()


class Hidden:
    """Its inspection raises an error."""

    @property
    def __class__(self) -> type:  # type: ignore[override]
        raise TypeError("no class")


def test_what_cannot_be_inspected_makes_the_unet_run_stock() -> None:
    dead = weakref.proxy(Counter())
    for store in (Hidden(), dead):
        unet = Toy()
        unet.attention.set_processor(Reading([store]))
        guards = Guards(unet)
        guards.refresh()
        assert guards.unsupported_reason is not None
        assert type(store).__name__ in guards.unsupported_reason


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
    unet.attention.set_processor(ByValue(other))
    unet.attention.processor.factor = lambda: other.bias.item()
    guards = capture(unet).guards
    epoch = guards.epoch
    nn.init.constant_(other.bias, 2)
    assert guards.changed_within_run()
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


class Growing(nn.Module):
    """Reads what may be added to it."""

    def __call__(self, attention: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        factor: Any = getattr(self, "gain", 1)
        return hidden_states * (factor.weight if isinstance(factor, nn.Module) else factor)


@pytest.mark.parametrize(
    "add",
    [
        lambda processor: setattr(processor, "gain", nn.Parameter(torch.ones(1))),
        lambda processor: processor.register_buffer("gain", torch.ones(1)),
        lambda processor: processor.add_module("gain", nn.Linear(1, 1)),
    ],
    ids=["parameter", "buffer", "module"],
)
def test_what_is_added_to_a_module_that_has_nothing_is_noticed(add: Callable[[nn.Module], Any]) -> None:
    unet = Toy()
    unet.attention.set_processor(Growing())
    guards = capture(unet).guards
    epoch = guards.epoch
    add(unet.attention.processor)
    assert guards.changed_within_run()
    guards.refresh()
    assert guards.epoch != epoch


class Doubling(Attention):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().forward(*args, **kwargs)
        return output * 2


class Louder(Reading):
    def factor(self) -> Any:
        return 2


@pytest.mark.parametrize("kind", ["module", "processor"])
def test_another_class_is_noticed(kind: str) -> None:
    unet = Toy()
    unet.attention.set_processor(Reading([0]))
    guards = capture(unet).guards
    epoch = guards.epoch
    if kind == "module":
        unet.attention.__class__ = Doubling
    else:
        unet.attention.processor.__class__ = Louder
    assert guards.changed_within_run()
    guards.refresh()
    assert guards.epoch != epoch


def executed(source: str) -> types.ModuleType:
    module = types.ModuleType("executed")
    exec(source, vars(module))
    return module


@pytest.mark.parametrize("value", [1, 2], ids=["the same value", "another value"])
def test_a_global_name_in_the_place_of_another_is_noticed(value: int) -> None:
    module = executed("other = 1\ndef read():\n    try: return kept\n    except NameError: return 2 * other")
    unet = Toy()
    unet.attention.set_processor(Elsewhere(module.read))
    guards = capture(unet).guards
    epoch = guards.epoch
    module.kept = value
    del module.other
    assert guards.changed_within_run()
    guards.refresh()
    assert guards.epoch != epoch


def test_what_a_capture_imports_stays_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package_of_a_user"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "late.py").write_text("SCALE = 2.0")
    monkeypatch.syspath_prepend(tmp_path)
    package_of_a_user = importlib.import_module("package_of_a_user")

    def read() -> Any:
        importlib.import_module("package_of_a_user.late")
        return package_of_a_user.late.SCALE

    unet = Toy()
    unet.attention.set_processor(Elsewhere(read))
    capture(unet)
    assert read() == 2


def test_what_an_import_in_a_capture_adds_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "late_patch_of_a_user.py").write_text("import test_state\ntest_state.OfAClass.kept = lambda: 2")
    monkeypatch.syspath_prepend(tmp_path)

    def read() -> Any:
        importlib.import_module("late_patch_of_a_user")
        return OfAClass.kept()  # type: ignore[attr-defined]

    unet = Toy()
    unet.attention.set_processor(Elsewhere(read))
    try:
        capture(unet)
        assert read() == 2
    finally:
        del OfAClass.kept  # type: ignore[attr-defined]


def test_a_module_that_is_imported_relatively(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in (tmp_path / "outer_of_a_user", tmp_path / "outer_of_a_user" / "inner"):
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / "scales.py").write_text("scale = 1.0")
    source = "def near():\n    from .scales import scale\n    return scale\n"
    source += "def far():\n    from .. import scales\n    return scales.scale\n"
    (tmp_path / "outer_of_a_user" / "inner" / "read.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    code = importlib.import_module("outer_of_a_user.inner.read")
    for read, name in ((code.near, "outer_of_a_user.inner.scales"), (code.far, "outer_of_a_user.scales")):
        read()
        unet = Toy()
        unet.attention.set_processor(Elsewhere(read))
        guards = capture(unet).guards
        sys.modules[name].scale = 2.0  # type: ignore[attr-defined]
        assert guards.changed_within_run()


@dataclass(frozen=True)
class FrozenSlots:
    __slots__ = ("_cached", "n")
    n: float

    def double(self) -> Any:
        if not hasattr(self, "_cached"):
            object.__setattr__(self, "_cached", 2 * self.n)
        return self._cached  # type: ignore[attr-defined]


def test_a_slot_that_refuses_writes_is_put_back() -> None:
    unet, store = Toy(), FrozenSlots(1.0)
    unet.attention.set_processor(Elsewhere(store.double))
    capture(unet)
    assert not hasattr(store, "_cached")


@pytest.mark.parametrize("kind", ["code", "attributes"])
def test_code_or_attributes_that_are_replaced_are_noticed(kind: str) -> None:
    def read() -> Any:
        return GLOBAL.n

    unet, store = Toy(), Counter()
    unet.attention.set_processor(Elsewhere(read) if kind == "code" else ReadingAnObject(store))
    guards = capture(unet).guards
    epoch = guards.epoch
    if kind == "code":
        read.__code__ = (lambda: 2).__code__
    else:
        store.__dict__ = {"n": 2}
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


class Mode(enum.Enum):
    FAST = 1


@pytest.mark.parametrize("store", [{torch.float16: 1.0}, {Mode.FAST: 1}, [np.float32(1), torch.device("cpu")]])
def test_equal_tables_of_new_processors_are_no_change(store: Any) -> None:
    unet = Toy()
    guards = Guards(unet)
    epochs = []
    for _ in range(3):
        unet.attention.set_processor(Reading(copy.copy(store)))
        guards.refresh()
        epochs.append(guards.epoch)
    assert len({*epochs}) == 1


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
