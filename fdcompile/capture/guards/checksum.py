"""Checksums of tensors, to detect writes."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from fdcompile.graph.weights import plain_tensors

_CHUNK = 1 << 24
"""Number of elements to multiply at once on a device."""


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """A checksum of each of `tensors`.

    It depends on all bits and their positions, so it also detects changes of sign or order and writes that preserve the
    norm. Checksums are computed on the devices of the tensors, with one synchronization for each device.

    Version counters are not enough: ``weight.data += delta``, by which PEFT fuses an adapter, does not change them.
    """
    sums = [[_checksum(bits) for bits in map(_bits, plain_tensors(tensor))] for tensor in tensors]
    waiting: dict[torch.device, list[Tensor]] = defaultdict(list)
    for one in (one for parts in sums for one in parts if isinstance(one, Tensor)):
        waiting[one.device].append(one)
    read = {device: iter(torch.stack(scalars).tolist()) for device, scalars in waiting.items()}
    return [hash(tuple(next(read[one.device]) if isinstance(one, Tensor) else one for one in parts)) for parts in sums]


def _bits(tensor: Tensor) -> Tensor:
    """The content in memory order, as 32-bit numbers if its size is a multiple of that."""
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).contiguous()
    flat = tensor.reshape(-1).view(torch.uint8)
    return flat if len(flat) % 4 else flat.view(torch.int32)


def _checksum(bits: Tensor) -> int | Tensor:
    return zlib.crc32(bits.numpy().data) if bits.device.type == "cpu" else weighted_sum(bits)


def weighted_sum(bits: Tensor) -> Tensor:
    """Sum of `bits`, weighted by position, so that any write to a single element changes it.

    It stays on the device, where there is no sequential checksum.
    """
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    factors = torch.arange(min(_CHUNK, len(bits)), device=bits.device)
    factors = factors.mul_(0x9E3779B1).bitwise_and_(0x3FFFFFFF).mul_(2).add_(1)  # odd, and all different
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK]
        total += (chunk * factors[: len(chunk)]).sum() * (start + 1)
    return total
