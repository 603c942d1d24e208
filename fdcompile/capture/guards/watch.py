"""Detects changes of dicts, lists, sets and places, mostly with one comparison in C."""

from __future__ import annotations

import copy
import functools
import gc
import operator
import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from fdcompile.capture.guards.reach import Place


class Watch:
    """The current entries of `containers`, values at `places`, contents of `arrays` and versions of `tensors`.

    Entries of containers are compared by identity first, then by value, but tensors only by identity. Lists and dicts
    of plain values in a dict are also treated as containers if `is_baked` returns True for their name and value. Of
    `dicts` only the values are compared, without the names: in one call for all, since it is done at every step.
    """

    def __init__(
        self,
        containers: Iterable[Any] = (),
        places: Iterable[Place] = (),
        tensors: Iterable[torch.Tensor] = (),
        arrays: Iterable[Any] = (),
        is_baked: Callable[[str, Any], bool] | None = None,
        dicts: Iterable[dict[str, Any]] = (),
    ) -> None:
        containers = list(containers)
        mutable = [
            value
            for values in containers
            if is_baked is not None and isinstance(values, dict)
            for name, value in values.items()
            if type(value) in (dict, list) and is_baked(name, value)
        ]
        self._live = [*containers, *mutable]
        self._dicts = list(dicts)
        # Tensors of one element are the only ones whose comparison by value does not raise an error.
        self._single = [values for values in (*containers, *self._dicts) if any(map(_is_single, _values(values)))]
        self._seen = [*map(_copy, containers), *map(copy.deepcopy, mutable)]
        self._places = [(place, place.value()) for place in places]
        self._readers = _readers(self._places)
        self._arrays = [np.asarray(array) for array in arrays]  # views of the same memory
        self._contents = [array.copy() for array in self._arrays]
        self._tensors = [tensor for tensor in tensors if not tensor.is_inference()]
        self._read_before = self._read()

    def untouched(self) -> bool:
        try:
            return self._live == self._seen and self._read() == self._read_before
        except (KeyError, RuntimeError, ValueError):  # deleted, or a tensor or array without a single truth value
            return False

    def restore(self) -> None:
        """Restores replaced entries, values and contents."""
        for live, seen in zip(self._live, self._seen, strict=True):
            if isinstance(live, dict):
                for name in live.keys() - seen.keys():
                    del live[name]
                live.update({name: value for name, value in seen.items() if live.get(name, live) is not value})
            else:
                live.clear()
                (live.update if isinstance(live, set) else live.extend)(seen)
        for place, value in self._places:
            if place.value() is not value:
                place.put(value)
        for array, content in zip(self._arrays, self._contents, strict=True):
            if array.tobytes() != content.tobytes():
                array[...] = content

    def _read(self) -> list[Any]:
        return [
            *[read() for read in self._readers],
            *(tensor._version for tensor in self._tensors),
            *(array.tobytes() for array in self._arrays),
            *map(id, gc.get_referents(*self._single)),
            gc.get_referents(*self._dicts),
        ]


def _values(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, Mapping) else container


def _is_single(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1


def _identity(place: Place) -> int:
    return id(place.value())


def _copy(container: Any) -> Any:
    return dict(container) if isinstance(container, types.MappingProxyType) else copy.copy(container)


def _readers(places: Iterable[tuple[Place, Any]]) -> list[Callable[[], Any]]:
    """Returns one reader for all names of each class or module, and one for each place elsewhere or without a value."""
    names: dict[int, list[str]] = defaultdict(list)
    owners: dict[int, Any] = {}
    others: list[Callable[[], Any]] = []
    for place, value in places:
        if _is_single(value):
            others.append(functools.partial(_identity, place))
        elif isinstance(place.owner, type | types.ModuleType) and place.name in vars(place.owner):
            owners[id(place.owner)] = vars(place.owner)
            names[id(place.owner)].append(place.name)
        else:
            others.append(place.value)
    return [functools.partial(operator.itemgetter(*names[key]), owner) for key, owner in owners.items()] + others
