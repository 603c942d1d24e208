"""A checksum of tensors, to detect writes."""

from __future__ import annotations

import itertools
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fdcompile.graph.weights import plain_tensors

_CHUNK = 1 << 21
"""Number of elements to multiply at once on a device, which takes 40 MB."""


def checksum_of(tensors: Iterable[Tensor]) -> int:
    """A checksum of the content of all `tensors`.

    It depends on all bits and their positions, so it also detects changes of sign or order and writes that preserve the
    norm. It is computed on the devices of the tensors, with one synchronization for each device.

    Version counters are not enough: ``weight.data += delta``, by which PEFT fuses an adapter, does not change them.
    """
    on_host = 0
    elsewhere: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for bits in (_bits(part) for tensor in tensors for part in plain_tensors(tensor)):
        if _is_on_host(bits):
            on_host = zlib.crc32(bits.numpy().data, on_host)
        else:
            elsewhere[bits.device, bits.dtype].append(bits)
    sums: dict[torch.device, list[Tensor]] = defaultdict(list)
    for (device, _), parts in elsewhere.items():
        sums[device] += map(weighted_sum, _chunks(parts))
    return hash((on_host, *(tuple(torch.stack(scalars).tolist()) for scalars in sums.values())))


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _bits(tensor: Tensor) -> Tensor:
    """The content in memory order, as 32-bit numbers if its size is a multiple of that."""
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).contiguous()
    flat = tensor.reshape(-1).view(torch.uint8)
    return flat if len(flat) % 4 else flat.view(torch.int32)


def _chunks(parts: list[Tensor]) -> Iterator[Tensor]:
    """Joins small `parts` in order, so that many of them share the launch of a kernel."""
    ends = itertools.accumulate(map(len, parts))
    for _, group in itertools.groupby(zip(parts, ends, strict=True), key=lambda pair: pair[1] // _CHUNK):
        together = [part for part, _ in group]
        yield torch.cat(together) if len(together) > 1 else together[0]


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
