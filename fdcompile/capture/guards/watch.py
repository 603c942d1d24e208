"""Detects changes of dicts, lists, sets and places, mostly with one comparison in C."""

from __future__ import annotations

import functools
import gc
import operator
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from fdcompile.capture.guards.places import ABSENT, Namespace, Place, is_library
from fdcompile.capture.guards.reach import MUTABLE

_CODE = (types.ModuleType, types.FunctionType, type, property, staticmethod, classmethod)


class Watch:
    """The current entries of `containers`, values at `places`, contents of `arrays`, versions of `tensors` and names.

    Entries of containers are compared by identity first, then by value, but tensors and objects of users only by
    identity. Of `namespaces` only the names are compared. Of `dicts` only the values are, in one call for all, since it
    is done at every step.
    """

    def __init__(
        self,
        containers: Iterable[Any] = (),
        places: Iterable[Place] = (),
        tensors: Iterable[torch.Tensor] = (),
        arrays: Iterable[Any] = (),
        namespaces: Iterable[Namespace] = (),
        dicts: Iterable[dict[str, Any]] = (),
    ) -> None:
        self._live = list(containers)
        self._dicts = list(dicts)
        self._by_identity = [
            values for values in (*self._live, *self._dicts) if any(map(_needs_identity, _values(values)))
        ]
        self._seen = [_kind(container)(container) for container in self._live]
        self._namespaces = list(namespaces)
        self._names = [{*namespace.current()} for namespace in self._namespaces]
        self._places = [(place, place.value()) for place in places]
        self._readers = _readers(self._places)
        self._arrays = [np.asarray(array) for array in arrays]  # views of the same memory
        self._contents = [array.copy() for array in self._arrays]
        self._tensors = [tensor for tensor in tensors if not tensor.is_inference()]
        self._read_before = self._read()

    def untouched(self) -> bool:
        try:
            return self._live == self._seen and self._read() == self._read_before
        except Exception:  # deleted, or a value that cannot be compared, such as an array
            return False

    def restore(self) -> None:
        """Restores replaced entries, values and contents."""
        for live, seen in zip(self._live, self._seen, strict=True):
            kind = _kind(live)
            if isinstance(live, dict):
                for name in live.keys() - seen.keys():
                    kind.__delitem__(live, name)
                for name, value in seen.items():
                    if kind.get(live, name, live) is not value:
                        kind.__setitem__(live, name, value)
            elif not isinstance(live, types.MappingProxyType):
                kind.clear(live)
                (kind.update if kind is set else kind.extend)(live, seen)
        for namespace, names in zip(self._namespaces, self._names, strict=True):
            new = {name: value for name, value in namespace.current().items() if name not in names}
            for name, value in new.items():
                if not isinstance(value, _CODE):  # an import is not repeated
                    Place(namespace.owner, name).put(ABSENT)
        for place, value in self._places:
            if place.value() is not value:
                place.put(value)
        for array, content in zip(self._arrays, self._contents, strict=True):
            if array.tobytes() != content.tobytes():
                array[...] = content

    def _read(self) -> list[Any]:
        return [
            *[read() for read in self._readers],
            *(namespace.current().keys() for namespace in self._namespaces),
            *(tensor._version for tensor in self._tensors),
            *(array.tobytes() for array in self._arrays),
            *map(id, gc.get_referents(*self._by_identity)),
            gc.get_referents(*self._dicts),
        ]


def _values(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, Mapping) else container


def _needs_identity(value: Any) -> bool:
    """Whether a comparison by value may call another object equal: a tensor of one element, or an object of a user.

    Comparison of other tensors raises an error.
    """
    kind: Any = type(value)
    try:
        if isinstance(value, torch.Tensor):
            return value.numel() == 1
        if kind in {*MUTABLE, tuple, frozenset}:
            return any(map(_needs_identity, _values(value)))
        is_users = not is_library(kind.__module__) and kind.__eq__ not in (object.__eq__, type.__eq__)
        return is_users or isinstance(value, weakref.ref)
    except Exception:  # it contains itself, or its inspection raises an error
        return True


def _identity(place: Place) -> int:
    return id(place.value())


def _kind(container: Any) -> Any:
    """The type of copies of `container`, and the one whose methods write to it: subclasses may override theirs."""
    return next((kind for kind in (OrderedDict, dict, list, set, deque) if isinstance(container, kind)), dict)


def _readers(places: Iterable[tuple[Place, Any]]) -> list[Callable[[], Any]]:
    """Returns one reader for all names of each class or module, and one for each place elsewhere or without a value."""
    names: dict[int, list[str]] = defaultdict(list)
    owners: dict[int, Any] = {}
    others: list[Callable[[], Any]] = []
    for place, value in places:
        if _needs_identity(value):
            others.append(functools.partial(_identity, place))
        elif place.namespace is not None and place.name in place.namespace:
            owners[id(place.owner)] = place.namespace
            names[id(place.owner)].append(place.name)
        else:
            others.append(place.value)
    return [functools.partial(operator.itemgetter(*names[key]), owner) for key, owner in owners.items()] + others
