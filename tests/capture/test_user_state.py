"""Digests of what user code reads: equal for equal state, as in another process, and different for any other."""

from __future__ import annotations

import enum
import json
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fdcompile.capture.guards import user_state


class Key:
    pass


class Mode(enum.Enum):
    FAST, SLOW = range(2)


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
    "types": (lambda: [torch.float16, np.float32], [lambda: [torch.float32, np.float32], lambda: [torch.float16, int]]),
    "enumeration": (lambda: Mode.FAST, [lambda: Mode.SLOW]),
    "numbers": (lambda: [np.float32(0.5), Fraction(1, 3)], [lambda: [np.float32(0.8), Fraction(1, 3)]]),
    "library functions": (
        lambda: nn.functional.silu,
        [lambda: nn.functional.relu, lambda: torch.sin, lambda: torch.cos],
    ),
    "classes": (lambda: nn.LayerNorm, [lambda: nn.GroupNorm]),
    "values": (lambda: [b"1", 1j, range(2), Path("a")], [lambda: [b"1", 1j, range(3), Path("a")]]),
    "layers": (lambda: nn.Sequential(held(1.0), held(2.0)), [lambda: nn.Sequential(held(2.0), held(1.0))]),
    "kinds of layers": (lambda: nn.Sequential(nn.ReLU()), [lambda: nn.Sequential(nn.SiLU())]),
    "called functions": (
        lambda: executed("from torch.nn import functional as F\ndef read(x): return F.silu(F.relu(F.gelu(F.elu(x))))"),
        [lambda: executed("from torch.nn import functional as F\ndef read(x): return F.silu(F.relu(F.gelu(x)))")],
    ),
    "set": (lambda: set(map(Processor, range(5))), [lambda: set(map(Processor, range(4)))]),
    "objects": (
        lambda: {"a": Processor(1), "b": Processor(2)},
        [lambda: {"a": Processor(2), "b": Processor(1)}, lambda: {"a": Processor(1)}],
    ),
    "tensor": (lambda: torch.ones(1), [lambda: torch.zeros(1)]),
}


@pytest.mark.parametrize("kind", EQUAL)
def test_digests_tell_states_apart(kind: str) -> None:
    make, others = EQUAL[kind]
    assert digests(make()) == digests(make())
    for other in others:
        assert digests(other()) != digests(make())


def all_digests() -> dict[str, dict[str, str]]:
    return {kind: digests(make()) for kind, (make, _) in EQUAL.items()}


def test_digests_are_those_of_another_process() -> None:
    command = "import json, test_user_state; print(json.dumps(test_user_state.all_digests()))"
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parent)}
    output = subprocess.run([sys.executable, "-c", command], env=environment, check=True, stdout=subprocess.PIPE)
    assert json.loads(output.stdout) == all_digests()
