"""The scene grammar that the miniature was trained on, and that its images are checked with.

A scene is one item, or two items in a relation, on a plain background:

    a striped red circle left of a blue square on a green background

Captions and scenes correspond one to one, so a caption completely specifies the scene. Place and size of the items are
not specified; `draw` chooses them at random.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZE = 32  #: width and height of an image in pixels
PALETTE = {
    "red": (214, 39, 40),
    "green": (44, 160, 60),
    "blue": (38, 84, 214),
    "yellow": (245, 208, 32),
    "purple": (148, 62, 190),
    "white": (244, 244, 244),
}
COLORS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle")
TEXTURES = ("solid", "striped", "checked")
RELATIONS = ("left of", "above")

_SUPERSAMPLING = 4
_STRIPE_PERIOD = 4.0  # pixels
_CHECK_PERIOD = 6.0  # pixels
_SHADE = 0.3  # brightness of the dark half of a texture
_TWO_ITEMS = 0.75  # share of sampled scenes that have two items

_ITEM = rf"a (?:({'|'.join(TEXTURES[1:])}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{_ITEM}(?: ({'|'.join(RELATIONS)}) {_ITEM})? on a ({'|'.join(COLORS)}) background")

ImageArray = NDArray[np.uint8]
Points = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Item:
    """An item of a scene."""

    shape: str
    color: str
    texture: str = "solid"

    @property
    def caption(self) -> str:
        """The noun phrase of the item, without the texture if it is "solid"."""
        texture = "" if self.texture == "solid" else f"{self.texture} "
        return f"a {texture}{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One item, with `relation` None, or two items, the first `relation` the second."""

    items: tuple[Item, ...]
    relation: str | None
    background: str

    def __post_init__(self) -> None:
        if len(self.items) != (1 if self.relation is None else 2):
            raise ValueError("a scene has one item and no relation, or two items and a relation")

    @property
    def caption(self) -> str:
        """The prompt for this scene."""
        return f"{f' {self.relation} '.join(item.caption for item in self.items)} on a {self.background} background"


def parse_caption(caption: str) -> Scene:
    """Parses a caption; the inverse of `Scene.caption`."""
    match = _CAPTION.fullmatch(caption)
    if match is None:
        raise ValueError(f"not a caption of this grammar: {caption!r}")
    texture, color, shape, relation, second_texture, second_color, second_shape, background = match.groups()
    items = [Item(shape, color, texture or "solid")]
    if relation is not None:
        items.append(Item(second_shape, second_color, second_texture or "solid"))
    return Scene(tuple(items), relation, background)


def sample_scene(rng: np.random.Generator) -> Scene:
    """Samples a scene; the color of the background differs from those of the items."""
    count = 2 if rng.random() < _TWO_ITEMS else 1
    items = tuple(Item(_choose(rng, SHAPES), _choose(rng, COLORS), _choose(rng, TEXTURES)) for _ in range(count))
    taken = {item.color for item in items}
    background = _choose(rng, tuple(color for color in COLORS if color not in taken))
    return Scene(items, _choose(rng, RELATIONS) if count == 2 else None, background)


def evaluation_scenes(count: int = 256, seed: int = 2024) -> list[Scene]:
    """Returns the first `count` distinct scenes of a fixed sequence; the default 256 are not in the training set."""
    rng = np.random.default_rng(seed)
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        scenes[sample_scene(rng)] = None
    return list(scenes)


def planning_scenes(count: int) -> list[Scene]:
    """Returns `count` distinct scenes for planning, none of which is in `evaluation_scenes`."""
    held_out = evaluation_scenes()
    others = evaluation_scenes(count + len(held_out), seed=77)
    return [scene for scene in others if scene not in held_out][:count]


def draw(scene: Scene, rng: np.random.Generator) -> ImageArray:
    """Draws the scene with anti-aliased edges and random placement; returns uint8 (SIZE, SIZE, 3)."""
    fine = SIZE * _SUPERSAMPLING
    x = (np.arange(fine, dtype=np.float32)[None, :] + 0.5) / _SUPERSAMPLING
    y = x.T
    canvas = np.empty((fine, fine, 3), np.float32)
    canvas[:] = PALETTE[scene.background]
    for item, (centre_x, centre_y, radius) in zip(scene.items, _placements(scene, rng), strict=True):
        dx, dy = x - centre_x, y - centre_y
        inside = _inside(item.shape, dx, dy, radius)
        bright = _bright(item.texture, dx, dy)
        canvas[inside] = np.multiply(PALETTE[item.color], _SHADE)
        canvas[inside & bright] = PALETTE[item.color]
    blocks = canvas.reshape(SIZE, _SUPERSAMPLING, SIZE, _SUPERSAMPLING, 3)
    image: ImageArray = blocks.mean(axis=(1, 3)).round().astype(np.uint8)
    return image


def _choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def _placements(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Returns center x, center y and radius of each item in pixels: one near the middle, or two side by side."""
    middle = SIZE / 2
    if scene.relation is None:
        dx, dy = rng.uniform(-4, 4, 2)
        return [(middle + dx, middle + dy, rng.uniform(6.5, 9.5))]
    places = []
    for side in (-1, 1):
        along, across = side * 7.75 + rng.uniform(-0.75, 0.75), rng.uniform(-4, 4)
        dx, dy = (along, across) if scene.relation == "left of" else (across, along)
        places.append((middle + dx, middle + dy, rng.uniform(5.5, 6.75)))
    return places


def _inside(shape: str, dx: Points, dy: Points, radius: float) -> NDArray[np.bool_]:
    """Returns a mask of the shape; all three shapes with the same radius have about the same extent."""
    if shape == "circle":
        return dx**2 + dy**2 < radius**2
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) < 0.9 * radius
    return (dy < 0.9 * radius) & (2 * np.abs(dx) < dy + 1.1 * radius)


def _bright(texture: str, dx: Points, dy: Points) -> NDArray[np.bool_]:
    """Returns a mask of the points with the item's full color; the others have its shade."""
    if texture == "striped":
        return dy % _STRIPE_PERIOD < _STRIPE_PERIOD / 2
    if texture == "checked":
        half = _CHECK_PERIOD / 2
        same: NDArray[np.bool_] = (dx % _CHECK_PERIOD < half) == (dy % _CHECK_PERIOD < half)
        return same
    return np.ones((1, 1), np.bool_)
