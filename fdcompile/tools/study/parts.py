"""The blocks of a UNet by the names of the paper's Table 5, and what its parts hold and compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fdcompile.graph.flops import flop_counter

ENCODER, BOTTLENECK, DECODER, EMBEDDINGS = "encoder", "bottleneck", "decoder", "embeddings"

_PARTS = {
    "conv_in": ENCODER,
    "down_blocks": ENCODER,
    "mid_block": BOTTLENECK,
    "up_blocks": DECODER,
    "conv_norm_out": DECODER,
    "conv_out": DECODER,
}
"""Children of a UNet; all others, and what its own forward computes, count as embeddings."""

_LETTERS = {"down_blocks": "E", "mid_block": "B", "up_blocks": "D"}


@dataclass(frozen=True)
class Part:
    """What a part of a UNet holds and computes (Table 8).

    Attributes:
        parameters: how many it has.
        flops: of one call of the UNet for one latent, a multiply-add as two.
    """

    parameters: int
    flops: int


@dataclass(frozen=True)
class Block:
    """What a block's features do, one entry a step, means over the pictures.

    Attributes:
        changes: Equation 2 of the paper, mean squared difference from the step before; of the first step 0.
        relative: the same over the mean square of the features.
        norms: their Frobenius norm, for one latent.
    """

    changes: tuple[float, ...]
    relative: tuple[float, ...]
    norms: tuple[float, ...]


def blocks_of(unet: nn.Module) -> list[tuple[str, nn.Module]]:
    """The letter of each block, E, B or D, in the order in which they run."""
    blocks: list[tuple[str, nn.Module]] = []
    for child, letter in _LETTERS.items():
        blocks += ((letter, module) for module in _modules(unet, child))
    return blocks


def block_name(letter: str, features: Tensor, taken: Iterable[str]) -> str:
    """As in Table 5: ``E_64`` is the block of the encoder that takes features of 64x64.

    A second one of that size is ``E_64b``; where height and width differ, both are said.
    """
    height, width = features.shape[-2:]
    name = f"{letter}_{height}" if height == width else f"{letter}_{height}x{width}"
    names = (f"{name}{suffix}" for suffix in ("", *"bcdefgh"))
    return next(name for name in names if name not in taken)


def parameters_of(unet: nn.Module) -> Counter[str]:
    """How many parameters each part has; one that is shared counts once."""
    counts: Counter[str] = Counter()
    for name, parameter in unet.named_parameters():
        counts[_PARTS.get(name.split(".")[0], EMBEDDINGS)] += parameter.numel()
    return counts


@contextmanager
def counting_flops(unet: nn.Module) -> Iterator[Counter[str]]:
    """Fills what it yields with the FLOPs of each part in the first call of `unet` in the block."""
    counter, flops = flop_counter(), Counter[str]()
    begun: list[int] = []

    def begin(*_: Any) -> None:
        begun.append(counter.get_total_flops())

    def end_of(part: str) -> Any:
        def end(*_: Any) -> None:
            flops[part] += counter.get_total_flops() - begun.pop()

        return end

    open_counter = ExitStack()

    def begin_call(*_: Any) -> None:
        open_counter.enter_context(counter)

    def end_call(*_: Any) -> None:
        open_counter.close()
        flops[EMBEDDINGS] += counter.get_total_flops() - flops.total()
        remove()

    handles = [unet.register_forward_pre_hook(begin_call), unet.register_forward_hook(end_call, always_call=True)]
    for child, part in _PARTS.items():
        for module in _modules(unet, child):
            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end_of(part))]

    def remove() -> None:
        while handles:
            handles.pop().remove()

    try:
        with torch.no_grad():
            yield flops
    finally:
        remove()


def _modules(unet: nn.Module, child: str) -> list[nn.Module]:
    """What `unet` calls under that name: all of a list, or one, or none."""
    module = getattr(unet, child, None)
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [] if module is None else [module]
