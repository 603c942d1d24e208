"""inductor against eager, and no compilation after the first image."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from models import flat_pipe, sample

import fdcompile
from fdcompile import Config
from fdcompile.backends import resolve_backend
from fdcompile.backends.inductor import InductorBackend


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on a CPU, and there is no g++")
def test_inductor_equals_eager_and_compiles_each_stage_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = flat_pipe()
    compilations = []
    compile_stage = torch._inductor.standalone_compile

    def counting(*args: Any, **kwargs: Any) -> Any:
        compilations.append(args)
        return compile_stage(*args, **kwargs)

    monkeypatch.setattr(torch._inductor, "standalone_compile", counting)
    config = {"key_steps": (0, 1, 4), "max_parallel_steps": 3}
    fdcompile.optimize(pipe, Config(**config, backend="eager"))
    expected = [sample(pipe, steps=9, seed=seed, guidance=guidance) for seed, guidance in ((0, 5.0), (1, 3.0))]
    fdcompile.optimize(pipe, Config(**config, backend="inductor"))
    first = sample(pipe, steps=9, seed=0, guidance=5.0)
    assert [start for start, _ in fdcompile.explain(pipe).groups] == [0, 1, 4]  # 1, 3, 3 and 2 steps at once
    assert len(compilations) == 3  # prompt, encoder, decoder
    assert fdcompile.explain(pipe).compile_seconds["decoder"] > 0
    second = sample(pipe, steps=9, seed=1, guidance=3.0)  # another prompt, seed and guidance scale
    assert len(compilations) == 3
    for actual, eager in zip((first, second), expected, strict=True):
        torch.testing.assert_close(actual, eager, rtol=0, atol=1e-3 * eager.abs().max().item())


def test_auto_is_eager_on_a_cpu_and_inductor_on_cuda() -> None:
    assert resolve_backend("auto", torch.device("cpu")).name == "eager"
    assert resolve_backend("auto", torch.device("cuda")).name == "inductor"


def test_a_users_own_backend_is_used() -> None:
    class Counting:
        name = "counting"

        def __init__(self) -> None:
            self.lowered: list[str] = []

        def lower(self, graph_module: Any, name: str) -> Any:
            self.lowered.append(name)
            return graph_module

    backend, pipe = Counting(), flat_pipe()
    fdcompile.optimize(pipe, Config(key_steps=5, backend=backend))
    sample(pipe)
    sample(pipe)
    assert backend.lowered == ["prompt", "encoder", "decoder"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fastest"}, "mode='fastest': expected one of default, "),
        ({"options": {"max_autotun": True}}, "torch._inductor.config has no 'max_autotun'"),
        ({"options": {"triton.cudagraphs": False}}, "set cuda_graphs=False"),
    ],
)
def test_options_that_torch_does_not_have_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InductorBackend(**options)


def test_options_reach_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def compile_stage(graph: Any, inputs: Any) -> Any:
        options = torch._inductor.config
        seen.append((options.max_autotune, options.triton.cudagraphs, options.epilogue_fusion))
        return lambda *tensors: graph(*tensors)

    monkeypatch.setattr(torch._inductor, "standalone_compile", compile_stage)
    graph = torch.fx.symbolic_trace(torch.nn.ReLU())
    for backend in (InductorBackend(), InductorBackend("max-autotune", options={"epilogue_fusion": False})):
        assert backend.lower(graph, "stage")(torch.ones(1)) == (1,)
    assert seen == [(False, False, True), (True, False, False)]
    assert Config(backend=InductorBackend()).program == Config(backend=InductorBackend()).program
