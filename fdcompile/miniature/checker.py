"""An independent classifier: a small CNN, trained on drawn scenes only, that predicts the scene of an image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from fdcompile.miniature import WEIGHTS
from fdcompile.miniature.scenes import COLORS, RELATIONS, SHAPES, SIZE, TEXTURES, ImageArray, Item, Scene

CHECKER_WEIGHTS = WEIGHTS / "checker.safetensors"
UNDEFINED = -1  #: label of the questions that do not apply to scenes of one item

_ITEM_OPTIONS: tuple[tuple[str, ...], ...] = (SHAPES, COLORS, TEXTURES)
#: Number of answers to each question about an image: item count, relation, background, two items.
_ANSWERS = (2, len(RELATIONS), len(COLORS), *(len(options) for options in _ITEM_OPTIONS * 2))


class Checker(nn.Module):
    """Maps images, float (N, 3, 32, 32), to logits (N, 34): the answers to all questions, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_convolution(3, 24, stride=1),
            *_convolution(24, 48, stride=2),
            *_convolution(48, 48, stride=1),
            *_convolution(48, 64, stride=2),
            *_convolution(64, 64, stride=1),
            nn.Conv2d(64, 20, 1),
            nn.Flatten(),
            nn.Linear(20 * (SIZE // 4) ** 2, 128),
            nn.SiLU(),
            nn.Linear(128, sum(_ANSWERS)),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits

    def answers(self, images: Tensor) -> list[Tensor]:
        """Returns the logits of each of the nine questions, shape (N, number of answers)."""
        return list(self(images).split(_ANSWERS, dim=1))


def normalize(images: Tensor) -> Tensor:
    """Converts uint8 (N, 3, 32, 32) to the checker's input: float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def labels(scene: Scene) -> list[int]:
    """Returns the index of the right answer to each of the nine questions; `UNDEFINED` if a question does not apply."""
    relation = UNDEFINED if scene.relation is None else RELATIONS.index(scene.relation)
    answers = [len(scene.items) - 1, relation, COLORS.index(scene.background)]
    for item in scene.items:
        answers += [SHAPES.index(item.shape), COLORS.index(item.color), TEXTURES.index(item.texture)]
    return answers + [UNDEFINED] * (len(_ANSWERS) - len(answers))


@cache
def load_checker() -> Checker:
    """Loads the trained checker in evaluation mode."""
    checker = Checker()
    checker.load_state_dict({name: value.float() for name, value in load_file(CHECKER_WEIGHTS).items()})
    return checker.eval()


@torch.no_grad()
def read_scenes(images: Sequence[Image.Image | ImageArray] | ImageArray, checker: Checker | None = None) -> list[Scene]:
    """Predicts the scene of each image. Images are PIL images or uint8 arrays (32, 32, 3)."""
    if len(images) == 0:
        return []
    stack = np.stack([np.asarray(image) for image in images])
    if stack.dtype != np.uint8 or stack.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"expected uint8 images of {SIZE}x{SIZE} RGB, got {stack.dtype} {stack.shape[1:]}")
    pixels = normalize(torch.from_numpy(stack).permute(0, 3, 1, 2))
    best = torch.stack([logits.argmax(1) for logits in (checker or load_checker()).answers(pixels)], dim=1)
    return [_scene(answers) for answers in best.tolist()]


def number_correct(images: Sequence[Image.Image | ImageArray] | ImageArray, scenes: Sequence[Scene]) -> int:
    """Counts the images in which every attribute of the requested scene is right."""
    if len(images) != len(scenes):
        raise ValueError(f"{len(images)} images for {len(scenes)} scenes")
    if not scenes:
        raise ValueError("no images to check")
    return sum(seen == asked for seen, asked in zip(read_scenes(images), scenes, strict=True))


def _convolution(channels: int, width: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, width, 3, stride, padding=1), nn.GroupNorm(8, width), nn.SiLU()


def _scene(answers: list[int]) -> Scene:
    """Converts the nine answers to a scene."""
    more, relation, background, *rest = answers
    items = [Item(SHAPES[shape], COLORS[color], TEXTURES[texture]) for shape, color, texture in (rest[:3], rest[3:])]
    return Scene(tuple(items[: more + 1]), RELATIONS[relation] if more else None, COLORS[background])
