"""Calls between two scheduler steps belong to the same tile from step to step, in whatever order they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import TEXT
from torch import Tensor

import fdcompile
from fdcompile import Config

TILES = 3
Order = Callable[[int], list[int]]


def run(pipe: Any, order: Order, steps: int = 10) -> Tensor:
    """Samples `TILES` latents one by one at each step, in the order of that step."""
    text = torch.randn(2, *TEXT, generator=torch.Generator().manual_seed(4))
    latents = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7 + tile)) for tile in range(TILES)]
    pipe.scheduler.set_timesteps(steps)
    with torch.no_grad():
        for step, t in enumerate(pipe.scheduler.timesteps):
            predictions: dict[int, Tensor] = {}
            for tile in order(step):
                predictions[tile] = pipe.unet(latents[tile], t, encoder_hidden_states=text.clone()).sample
            stacked = torch.cat([predictions[tile] for tile in range(TILES)])
            latents = list(pipe.scheduler.step(stacked, t, torch.cat(latents)).prev_sample.chunk(TILES))
    return torch.cat(latents)


def shuffled(step: int) -> list[int]:
    return torch.randperm(TILES, generator=torch.Generator().manual_seed(step)).tolist()


def backwards_at_odd_steps(step: int) -> list[int]:
    return list(range(TILES))[:: -1 if step % 2 else 1]


def rotated(step: int) -> list[int]:
    return [(tile + step) % TILES for tile in range(TILES)]


@pytest.mark.parametrize("order", [shuffled, backwards_at_odd_steps, rotated])
def test_tiles_in_another_order_keep_their_features(pipe: Any, order: Order) -> None:
    fdcompile.optimize(pipe, Config(key_steps=(0, 1, 4, 7)))
    expected = run(pipe, lambda step: list(range(TILES)))
    actual = run(pipe, order)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    report = fdcompile.explain(pipe)
    assert (report.encoder_runs, report.forced_key_steps) == (4 * TILES, ())


def test_one_tile_less_at_some_steps_is_not_given_the_features_of_another(pipe: Any, stock: Any) -> None:
    """A pipeline that leaves a tile as it is at odd steps."""

    def without_the_first(step: int) -> list[int]:
        return list(range(step % 2, TILES))

    def sampled(pipe: Any) -> Tensor:
        text = torch.randn(2, *TEXT, generator=torch.Generator().manual_seed(4))
        latents = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7 + tile)) for tile in range(TILES)]
        pipe.scheduler.set_timesteps(6)
        with torch.no_grad():
            for step, t in enumerate(pipe.scheduler.timesteps):
                for tile in without_the_first(step):
                    latents[tile] = latents[tile] - 0.1 * pipe.unet(latents[tile], t, encoder_hidden_states=text).sample
                pipe.scheduler._step_index = None
                pipe.scheduler.step(latents[0], t, latents[0])
        return torch.cat(latents)

    expected = sampled(stock)
    fdcompile.optimize(pipe, Config(key_steps="all"))
    torch.testing.assert_close(sampled(pipe), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    fdcompile.optimize(pipe, Config(key_steps=(0, 2, 4)))
    assert (sampled(pipe) - expected).abs().max() < 0.1 * expected.abs().max()
