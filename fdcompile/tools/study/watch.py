"""Reduces the features of a UNet's blocks during runs; memory does not grow with steps or images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fdcompile.measure.metrics import Images
from fdcompile.runtime.clock import Position
from fdcompile.tools.study.parts import block_name, blocks_of

SHOWN_STEPS = 8
"""Number of evenly spaced steps for the principal components."""

_LARGEST = 64
"""Largest height and width of an image of principal components."""


Sums = defaultdict[int, float]
"""Sum over calls for each step."""


@dataclass
class _Block:
    """Sums over the images, and the features of the last step."""

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
        blocks: blocks by name, in execution order; empty before the first call of the UNet.
        calls: number of pipeline calls seen.
        shown: steps for the principal components.
        first_batch: number of latents in the first call of the UNet.
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
        """Observes one call of the pipeline in the block."""
        with ExitStack() as hooks:
            for letter, module in blocks_of(self._unet):
                hooks.enter_context(module.register_forward_hook(partial(self._called, letter), with_kwargs=True))
            try:
                yield
            finally:
                for block in self.blocks.values():
                    block.before = None
                self.calls += 1

    def output_hook(self, position: Position, output: Tensor) -> Tensor:
        """Adds the features of a UNet call; of several calls in a step only the first one counts."""
        if not self.shown:
            self.first_batch = len(output)
            last = self._count() - 1
            self.shown = sorted({round(step) for step in np.linspace(position.start, last, SHOWN_STEPS)})
        if position.slot == 0:
            for name, features in self._features.items():
                self._add(self.blocks[name], features.float(), position.step)
        self._features = {}
        return output

    def components(self) -> dict[str, Images]:
        """Returns the first three principal components of each block's features as RGB images (Fig. 3).

        Computed for the last latent of the first call, jointly over `SHOWN_STEPS` steps; shape
        ``[steps, height, width, 3]``.
        """
        return {name: _principal(torch.stack(block.shown)) for name, block in self.blocks.items()}

    def _called(self, letter: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if module not in self._names:
            taken = args[0] if args else kwargs["hidden_states"]
            name = self._names[module] = block_name(letter, taken, self.blocks)
            self.blocks[name] = _Block()
        self._features[self._names[module]] = (output[0] if isinstance(output, tuple) else output).detach()

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
    """Reduces one latent's features to ``[channels, height, width]`` of at most `_LARGEST`; of a video, frame 0."""
    features = features if features.ndim == 3 else features[:, 0]
    if max(features.shape[-2:]) > _LARGEST:
        height, width = (min(side, _LARGEST) for side in features.shape[-2:])
        features = nn.functional.adaptive_avg_pool2d(features, (height, width))
    return features.cpu()


def _principal(features: Tensor) -> Images:
    steps, channels, height, width = features.shape
    points = features.movedim(1, -1).reshape(-1, channels)
    centered = points - points.mean(0)
    _, vectors = torch.linalg.eigh(centered.T @ centered)
    leading = centered @ vectors[:, -3:].flip(1)  # fewer than three if there are fewer channels
    low, high = leading.amin(0), leading.amax(0)
    scaled = (leading - low) / (high - low).clamp(min=1e-12) * 255
    images: Images = np.zeros((steps, height, width, 3), np.uint8)
    images[..., : leading.shape[1]] = scaled.round().byte().reshape(steps, height, width, -1).numpy()
    return images
