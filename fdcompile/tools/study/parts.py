"""Names of a UNet's blocks (Table 5 of the paper), and parameters and FLOPs of its parts (Table 8)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fdcompile.graph.flops import flop_counter

PARTS = ENCODER, BOTTLENECK, DECODER, EMBEDDINGS = "encoder", "bottleneck", "decoder", "embeddings"

_PARTS = {
    "conv_in": ENCODER,
    "down_blocks": ENCODER,
    "mid_block": BOTTLENECK,
    "up_blocks": DECODER,
    "conv_norm_out": DECODER,
    "conv_out": DECODER,
}
"""Part of each child of a UNet; other children, and the computation in its own forward, count as embeddings."""

_LETTERS = {"down_blocks": "E", "mid_block": "B", "up_blocks": "D"}


@dataclass(frozen=True)
class Part:
    """Parameters and FLOPs of a part of a UNet (Table 8).

    Attributes:
        parameters: number of parameters.
        flops: FLOPs in one call of the UNet per latent; a multiply-add counts as two.
    """

    parameters: int
    flops: int


@dataclass(frozen=True)
class Block:
    """Change of a block's features, one entry for each step, mean over the images.

    Attributes:
        changes: mean squared difference from the previous step (Eq. 2 of the paper); 0 for the first step.
        relative: `changes` over the mean square of the features.
        norms: Frobenius norm of the features of one latent.
    """

    changes: tuple[float, ...]
    relative: tuple[float, ...]
    norms: tuple[float, ...]


def blocks_of(unet: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the blocks in execution order, each with its letter: E, B or D."""
    return [(letter, module) for child, letter in _LETTERS.items() for module in _modules(unet, child)]


def block_name(letter: str, features: Tensor, taken: Iterable[str]) -> str:
    """Names a block as in Table 5: ``E_64`` is the block of the encoder with input features of 64x64.

    A second block of the same size is ``E_64b``. If height and width differ, the name has both.
    """
    height, width = features.shape[-2:]
    name = f"{letter}_{height}" if height == width else f"{letter}_{height}x{width}"
    names = (f"{name}{suffix}" for suffix in ("", *"bcdefgh"))
    return next(name for name in names if name not in taken)


def parameters_of(unet: nn.Module) -> Counter[str]:
    """Returns the number of parameters of each part; shared parameters count once."""
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

    def end(part: str, *_: Any) -> None:
        flops[part] += counter.get_total_flops() - begun.pop()

    def begin_call(*_: Any) -> None:
        opened.enter_context(counter)

    def end_call(*_: Any) -> None:
        opened.close()
        flops[EMBEDDINGS] += counter.get_total_flops() - flops.total()

    with torch.no_grad(), ExitStack() as opened:  # the hooks, and the counter during the call
        opened.enter_context(unet.register_forward_pre_hook(begin_call))
        opened.enter_context(unet.register_forward_hook(end_call, always_call=True))
        for child, part in _PARTS.items():
            for module in _modules(unet, child):
                opened.enter_context(module.register_forward_pre_hook(begin))
                opened.enter_context(module.register_forward_hook(partial(end, part)))
        yield flops


def _modules(unet: nn.Module, child: str) -> list[nn.Module]:
    """Returns the modules of the attribute `child`: those of a list, a single one, or none."""
    module = getattr(unet, child, None)
    return list(module) if isinstance(module, nn.ModuleList) else [module] if module is not None else []
