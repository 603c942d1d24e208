"""What a call of a UNet changes, which a graph does not repeat: noticed, and undone after a capture."""

from __future__ import annotations

import collections
import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture.toy import GLOBAL, Counter, Elsewhere, Reading, Toy, call, capture
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from fdcompile.capture.export import StatefulError
from fdcompile.capture.guards import Guards
from fdcompile.runtime.graph_cache import GraphCache


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
