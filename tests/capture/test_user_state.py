"""Digests of what user code reads: equal for equal state, as in another process, and different for any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fdcompile.capture.guards import user_state


class Key:
    pass


class Processor:
    def __init__(self, store: Any) -> None:
        self.store = store

    def __call__(self, *args: Any) -> Any:
        return self.store


def digests(store: Any) -> dict[str, str]:
    unet = nn.Sequential(nn.Identity())
    unet[0].__dict__["processor"] = Processor(store)
    return user_state(unet)


def executed(source: str) -> Callable[..., Any]:
    names: dict[str, Any] = {"__name__": "executed"}
    exec(source, names)
    return names["read"]  # type: ignore[no-any-return]


def held(bias: float, n: int = 0) -> nn.Module:
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 1)
    nn.init.constant_(layer.bias, bias)
    layer.n = n
    return layer


EQUAL: dict[str, tuple[Callable[[], Any], list[Callable[[], Any]]]] = {
    "executed code": (
        lambda: executed("def read(n): return [(lambda m: m + 1)(n), n in {'a', 'b', 'c'}]"),
        [
            lambda: executed("def read(n): return [(lambda m: m - 1)(n), n in {'a', 'b', 'c'}]"),
            lambda: executed("def read(n): return [(lambda m: m + 2)(n), n in {'a', 'b', 'c'}]"),
            lambda: executed("def read(n): return [(lambda m: m + 1)(n), n in {'a', 'b', 'd'}]"),
        ],
    ),
    "objects as keys": (lambda: {Key(): 1}, [lambda: {Key(): 2}]),
    "array of objects": (lambda: np.array([1, None]), [lambda: np.array([2, None])]),
    "module": (lambda: held(1.0), [lambda: held(2.0), lambda: held(1.0, n=1)]),
    "weights of a module in a list": (lambda: [held(1.0)], [lambda: [held(2.0)]]),
    "tensor": (lambda: torch.ones(1), [lambda: torch.zeros(1)]),
}


@pytest.mark.parametrize("kind", EQUAL)
def test_digests_tell_states_apart(kind: str) -> None:
    make, others = EQUAL[kind]
    assert digests(make()) == digests(make())
    for other in others:
        assert digests(other()) != digests(make())
