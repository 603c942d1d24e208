"""Whatever Python code of a UNet reads is watched, wherever it is."""

from __future__ import annotations

import argparse
import array
import collections
import contextvars
import copy
import ctypes
import enum
import functools
import importlib
import itertools
import operator
import random
import sys
import threading
import types
import weakref
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from capture.toy import GLOBAL, Counter, Elsewhere, Reading, ReadingAnObject, Toy, capture
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from fdcompile.capture.guards import Guards


class ReadingAnArrayAsATensor(Reading):
    def factor(self) -> Any:
        return torch.from_numpy(self.store)


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
