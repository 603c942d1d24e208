"""Reduces the features of a UNet's blocks as they come; memory does not grow with steps or pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fdcompile.measure.metrics import Pictures
from fdcompile.runtime.clock import Position
from fdcompile.tools.study.parts import block_name, blocks_of

SHOWN_STEPS = 8
"""Steps whose principal components are shown, evenly chosen."""

_LARGEST = 64
"""Side in features that a picture of principal components is reduced to."""


Sums = defaultdict[int, float]
"""Over calls, for each step."""


@dataclass
class _Block:
    """Sums over the pictures, and the features of the last step."""

    changes: Sums = field(default_factory=lambda: defaultdict(float))
    relative: Sums = field(default_factory=lambda: defaultdict(float))
    norms: Sums = field(default_factory=lambda: defaultdict(float))
    before: Tensor | None = None
    shown: list[Tensor] = field(default_factory=list)

    @property
    def sums(self) -> tuple[Sums, ...]:
        return self.changes, self.relative, self.norms


class Watch:
    """Observes the outputs of a UNet's blocks while its pipeline runs.

    Attributes:
        blocks: by name, in the order in which they run; known once the UNet was called.
        calls: how many pipeline calls were seen.
        shown: the steps whose principal components are shown.
        first_batch: latents in the first call of the UNet.
    """

    def __init__(self, unet: nn.Module, steps: Callable[[], int]) -> None:
        self.blocks: dict[str, _Block] = {}
        self.calls = 0
        self.shown: list[int] = []
        self.first_batch = 0
        self._unet, self._count = unet, steps
        self._names: dict[nn.Module, str] = {}
        self._features: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """One call of the pipeline."""
        handles = [
            module.register_forward_hook(self._hook(letter), with_kwargs=True)
            for letter, module in blocks_of(self._unet)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block in self.blocks.values():
                block.before = None
            self.calls += 1

    def see(self, position: Position, output: Tensor) -> Tensor:
        """After each call of the UNet; of several in a step the first one counts."""
        if not self.shown:
            self.first_batch = len(output)
            last = self._count() - 1
            self.shown = sorted({round(step) for step in np.linspace(position.start, last, SHOWN_STEPS)})
        if position.slot == 0:
            for name, features in self._features.items():
                self._add(self.blocks[name], features.float(), position.step)
        self._features = {}
        return output

    def held_bytes(self) -> int:
        """Bytes of features that are kept."""
        kept = (tensor for block in self.blocks.values() for tensor in (block.before, *block.shown))
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def components(self) -> dict[str, Pictures]:
        """The first three principal components of each block's features as red, green and blue (Fig. 3).

        Of the last latent of the first call, over `SHOWN_STEPS` steps together. Shape ``[steps, height, width, 3]``.
        """
        return {name: _principal(torch.stack(block.shown)) for name, block in self.blocks.items()}

    def _hook(self, letter: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if module not in self._names:
                taken = args[0] if args else kwargs["hidden_states"]
                name = self._names[module] = block_name(letter, taken, self.blocks)
                self.blocks[name] = _Block()
            self._features[self._names[module]] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    def _add(self, block: _Block, features: Tensor, step: int) -> None:
        block.norms[step] += features.flatten(1).norm(dim=1).mean().item()
        if block.before is not None:
            change = (features - block.before).square().mean().item()
            block.changes[step] += change
            block.relative[step] += change / features.square().mean().item()
        block.before = features
        if self.calls == 0 and step in self.shown:
            block.shown.append(_reduced(features[-1]))


def _reduced(features: Tensor) -> Tensor:
    """One latent's features, shape ``[channels, height, width]``, of a video its first frame, not above `_LARGEST`."""
    features = features if features.ndim == 3 else features[:, 0]
    if max(features.shape[-2:]) > _LARGEST:
        height, width = (min(side, _LARGEST) for side in features.shape[-2:])
        features = nn.functional.adaptive_avg_pool2d(features, (height, width))
    return features.cpu()


def _principal(features: Tensor) -> Pictures:
    steps, channels, height, width = features.shape
    points = features.movedim(1, -1).reshape(-1, channels)
    centred = points - points.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    leading = centred @ vectors[:, -3:].flip(1)  # as many as there are channels, in a very small UNet
    low, high = leading.amin(0), leading.amax(0)
    scaled = (leading - low) / (high - low).clamp(min=1e-12) * 255
    pictures: Pictures = np.zeros((steps, height, width, 3), np.uint8)
    pictures[..., : leading.shape[1]] = scaled.round().byte().reshape(steps, height, width, -1).numpy()
    return pictures
