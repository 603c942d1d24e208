"""inductor against eager, and no compilation after the first image."""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo
from models import sample

import fdcompile
from fdcompile import Config
from fdcompile.backends import resolve_backend


def test_inductor_equals_eager_and_compiles_once(pipe: Any) -> None:
    config = {"key_steps": (0, 1, 4), "max_parallel_steps": 3}
    fdcompile.optimize(pipe, Config(**config, backend="eager"))
    expected = [sample(pipe, steps=7, seed=seed, guidance=guidance) for seed, guidance in ((0, 5.0), (1, 3.0))]
    fdcompile.optimize(pipe, Config(**config, backend="inductor"))
    first = sample(pipe, steps=7, seed=0, guidance=5.0)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.compiler.set_stance("fail_on_recompile"):
        second = sample(pipe, steps=7, seed=1, guidance=3.0)  # another prompt, seed and guidance scale
    for actual, eager in zip((first, second), expected, strict=True):
        torch.testing.assert_close(actual, eager, rtol=0, atol=1e-3 * eager.abs().max().item())
    assert fdcompile.explain(pipe).compile_seconds["decoder"] > 0


def test_auto_is_eager_on_a_cpu_and_inductor_on_cuda() -> None:
    assert resolve_backend("auto", torch.device("cpu")).name == "eager"
    assert resolve_backend("auto", torch.device("cuda")).name == "inductor"


def test_a_users_own_backend_is_used(pipe: Any) -> None:
    class Counting:
        name = "counting"

        def __init__(self) -> None:
            self.lowered: list[str] = []

        def lower(self, graph_module: Any, name: str) -> Any:
            self.lowered.append(name)
            return graph_module

    backend = Counting()
    fdcompile.optimize(pipe, Config(key_steps=5, backend=backend))
    sample(pipe)
    sample(pipe)
    assert backend.lowered == ["prompt", "encoder", "decoder"]
