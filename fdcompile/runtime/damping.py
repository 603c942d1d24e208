"""Damp a forecast by how good the last one would have been, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-30
"""Instead of dividing by a forecast change of nothing."""


def damping(actual: Tensor, forecast: Tensor, latents: Tensor, guidance: float | None) -> Tensor:
    """How much of its weights' change the next forecast is to take: a factor in [0, 1] for each latent, ``[batch]``.

    It is ``clip(<A, P> / <P, P>, 0, 1)``, where ``P`` is the change to this key step that the weights would have
    forecast, and ``A`` the one that happened. With guidance these are the guided changes where the batch is stacked,
    which shows in equal halves of `latents`; both halves then have one factor. No value is read from the device.

    Args:
        actual: ``A``, its first axis a multiple of the batch (a video's frames are folded into it).
        forecast: ``P``, of the same shape.
        latents: of this step, as the UNet is given them.
        guidance: scale of the guidance, None or at most 1 where there is none.
    """
    batch = len(latents)
    alone = _ratio(actual, forecast, batch)
    if guidance is None or guidance <= 1 or batch % 2:
        return alone
    halves = latents.chunk(2)
    stacked = (halves[0] == halves[1]).all()
    guided = _ratio(_guided(actual, guidance), _guided(forecast, guidance), batch // 2)
    return torch.where(stacked, guided.repeat(2), alone)


def damp(feature: Tensor, before: Tensor, factor: Tensor) -> Tensor:
    """``f + factor * (f_before - f)``: a forecast from it is one from `before` with `factor` times the weight."""
    scale = factor.to(feature.dtype).repeat_interleave(len(feature) // len(factor))
    damped: Tensor = feature + scale.view(-1, *[1] * (feature.ndim - 1)) * (before - feature)
    return damped


def _guided(change: Tensor, scale: float) -> Tensor:
    empty, asked = change.chunk(2)
    return empty + scale * (asked - empty)


def _ratio(actual: Tensor, forecast: Tensor, batch: int) -> Tensor:
    actual, forecast = (change.float().reshape(batch, -1) for change in (actual, forecast))
    return ((actual * forecast).sum(1) / (forecast * forecast).sum(1).clamp_min(_LEAST)).clamp(0, 1)
