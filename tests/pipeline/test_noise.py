"""Prior noise injection against the paper's formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import flat_pipe, sample

import fdcompile
from fdcompile import Config, NoiseInjection


@pytest.fixture
def pipe() -> Any:
    return flat_pipe()


class Recorder:
    """Replaces the scheduler's step by one that records the latents it is given."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.samples: list[torch.Tensor] = []
        stock_step = pipe.scheduler.step

        def step(model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
            self.samples.append(sample)
            return stock_step(model_output, timestep, sample, **kwargs)

        monkeypatch.setattr(type(pipe.scheduler), "step", lambda self, *args, **kwargs: step(*args, **kwargs))


def run(pipe: Any, monkeypatch: pytest.MonkeyPatch, config: Config, **kwargs: Any) -> tuple[list[Any], list[Any]]:
    """(latents the pipeline had, latents the scheduler was given) at each step."""
    fdcompile.restore(pipe)
    with monkeypatch.context() as patch:
        recorder = Recorder(pipe, patch)
        fdcompile.optimize(pipe, config)
        outside: list[torch.Tensor] = []
        initial = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        kept = initial.clone()

        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            outside.append(tensors["latents"].clone())
            return {}

        sample(pipe, latents=initial, callback_on_step_end=callback, **kwargs)
        fdcompile.restore(pipe)
    assert torch.equal(initial, kept), "the caller's latents were written to"
    return [initial, *outside[:-1]], recorder.samples


def test_injected_below_tau_only(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.paper(noise_injection=NoiseInjection(alpha=0.1, tau=0.5))
    pipeline_latents, scheduler_latents = run(pipe, monkeypatch, config)
    timesteps = pipe.scheduler.timesteps.tolist()
    injected = 0
    for t, latents, given in zip(timesteps, pipeline_latents, scheduler_latents, strict=True):
        applies = t / 1000 < 0.5
        injected += applies
        expected = latents + 0.1 * pipeline_latents[0] if applies else latents
        torch.testing.assert_close(given, expected)
    assert injected == 5


def test_injected_where_somebody_has_replaced_step_since_it_was_watched(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watching = fdcompile.optimize(flat_pipe())
    test_injected_below_tau_only(pipe, monkeypatch)
    fdcompile.restore(watching)
    assert type(pipe.scheduler).step.__module__.startswith("diffusers.")


@pytest.mark.parametrize(("key_steps", "injects"), [("paper", True), ("all", False)])
def test_auto_injects_when_steps_are_propagated(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, key_steps: Any, injects: bool
) -> None:
    config = Config(key_steps=key_steps, noise_injection="auto")
    pipeline_latents, scheduler_latents = run(pipe, monkeypatch, config)
    assert torch.equal(pipeline_latents[-1], scheduler_latents[-1]) is not injects


def test_off_by_default(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline_latents, scheduler_latents = run(pipe, monkeypatch, Config.paper())
    assert all(torch.equal(a, b) for a, b in zip(pipeline_latents, scheduler_latents, strict=True))
