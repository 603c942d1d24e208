"""Damps a forecast by how well it would have predicted the last key step. Runs on the device."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-30
"""Smallest denominator, for a forecast that predicts no change."""


def damping(actual: Tensor, forecast: Tensor, latents: Tensor, guidance: float | None) -> Tensor:
    """Computes the factor in [0, 1] that scales the next forecast's change, for each latent.

    It is ``clip(<A, P> / <P, P>, 0, 1)``, where ``P`` is the change to this key step that the weights would have
    forecast, and ``A`` the actual one. If the batch holds an unconditional and a conditional half, recognized by equal
    halves of `latents`, the guided changes are used, and both halves get the same factor. No value is read from the
    device.

    Args:
        actual: ``A``; its first axis is a multiple of the batch (frames of a video are folded into it).
        forecast: ``P``, of the same shape.
        latents: latents of this step, as passed to the UNet.
        guidance: guidance scale; None or at most 1 without guidance.

    Returns:
        The factors, shape ``[batch]``.
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
    """``f + factor * (f_before - f)``: used in place of `before`, it multiplies the forecast's weight by `factor`."""
    scale = factor.to(feature.dtype).repeat_interleave(len(feature) // len(factor))
    damped: Tensor = feature + scale.view(-1, *[1] * (feature.ndim - 1)) * (before - feature)
    return damped


def _guided(change: Tensor, scale: float) -> Tensor:
    empty, asked = change.chunk(2)
    return empty + scale * (asked - empty)


def _ratio(actual: Tensor, forecast: Tensor, batch: int) -> Tensor:
    actual, forecast = (change.float().reshape(batch, -1) for change in (actual, forecast))
    return ((actual * forecast).sum(1) / (forecast * forecast).sum(1).clamp_min(_LEAST)).clamp(0, 1)
