"""Block names of a UNet as in the paper's Table 5, and parameters and FLOPs of its parts."""

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
    """Parameters and FLOPs of a part of a UNet (Table 8).

    Attributes:
        parameters: their number.
        flops: of one call of the UNet for one latent, a multiply-add as two.
    """

    parameters: int
    flops: int


@dataclass(frozen=True)
class Block:
    """How a block's features change, one entry for each step, means over the pictures.

    Attributes:
        changes: Equation 2 of the paper, mean squared difference from the step before; of the first step 0.
        relative: the same over the mean square of the features.
        norms: their Frobenius norm, for one latent.
    """

    changes: tuple[float, ...]
    relative: tuple[float, ...]
    norms: tuple[float, ...]


def blocks_of(unet: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks in the order in which they run, each with its letter, E, B or D."""
    blocks: list[tuple[str, nn.Module]] = []
    for child, letter in _LETTERS.items():
        blocks += ((letter, module) for module in _modules(unet, child))
    return blocks


def block_name(letter: str, features: Tensor, taken: Iterable[str]) -> str:
    """As in Table 5: ``E_64`` is the block of the encoder that takes features of 64x64.

    A second block of the same size is ``E_64b``; if height and width differ, the name has both.
    """
    height, width = features.shape[-2:]
    name = f"{letter}_{height}" if height == width else f"{letter}_{height}x{width}"
    names = (f"{name}{suffix}" for suffix in ("", *"bcdefgh"))
    return next(name for name in names if name not in taken)


def parameters_of(unet: nn.Module) -> Counter[str]:
    """Number of parameters of each part; shared ones count once."""
    counts: Counter[str] = Counter()
    for name, parameter in unet.named_parameters():
        counts[_PARTS.get(name.split(".")[0], EMBEDDINGS)] += parameter.numel()
    return counts


@contextmanager
def counting_flops(unet: nn.Module) -> Iterator[Counter[str]]:
    """Yields a counter that the first call of `unet` in the block fills with the FLOPs of each part."""
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
    """The modules of the attribute `child`: those of a list, a single one, or none."""
    module = getattr(unet, child, None)
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [] if module is None else [module]
