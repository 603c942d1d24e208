"""Images of a variant, generated once, stored in a folder and read in batches."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fdcompile.measure.calls import as_images
from fdcompile.measure.metrics import Images
from fdcompile.measure.variant import Variant
from fdcompile.tools.evaluate.captions import Caption
from fdcompile.tools.generate.job import Make
from fdcompile.tools.generate.store import ResultStore

_TOGETHER = 32


@dataclass(frozen=True)
class Spec:
    """The calls of every variant.

    Attributes:
        captions: one image or video each.
        arguments: arguments of every call, such as the guidance scale, without the number of steps.
        steps: number of steps of variants without their own.
        inputs: folder of input images, named as the images of the captions. In subfolders with the names of the
            variants' folders, each variant has its own, or those of its stock pipeline.
        batch: number of captions per call.
    """

    captions: Sequence[Caption]
    arguments: Mapping[str, Any]
    steps: int
    inputs: Path | None = None
    batch: int = 1

    def steps_of(self, variant: Variant) -> int:
        return variant.steps or variant.full_steps or self.steps

    def call(self, pipe: Any, variant: Variant, captions: Sequence[Caption]) -> list[list[Image.Image]]:
        """Calls `pipe` and returns the frames of each output; an image is one frame."""
        given = dict(self.arguments) | {"num_inference_steps": self.steps_of(variant)}
        if self.inputs is not None:
            given["image"] = [_opened(self._input(variant, caption)) for caption in captions]
        generators = [torch.Generator().manual_seed(caption.seed) for caption in captions]
        output = pipe([caption.text for caption in captions], generator=generators, **given)
        return _frames(output, len(captions))

    def check_inputs(self, variants: Sequence[Variant]) -> None:
        """Checks that every caption has an input image, if `inputs` is given.

        Raises:
            ValueError: an image is missing; the message names the first.
        """
        if self.inputs is not None:
            paths = (self._input(variant, caption) for variant in variants for caption in self.captions)
            if missing := next((path for path in paths if not path.is_file()), None):
                raise ValueError(f"{missing}: there is no such image to start from")

    def _input(self, variant: Variant, caption: Caption) -> Path:
        assert self.inputs is not None
        folders = (self.inputs / folder_name(name) for name in (variant.name, variant.reference().name))
        return next(filter(Path.is_dir, folders), self.inputs) / caption.file

    def maker(self, pipe: Any, variant: Variant, about: dict[str, Any]) -> Make:
        """Returns a function that stacks the frames of each output into an image, and sets their number in `about`."""

        def make(captions: Any) -> list[Image.Image]:
            made = self.call(pipe, variant, captions)
            about["frames"] = len(made[0])
            return [Image.fromarray(np.concatenate(as_images(frames))) for frames in made]

        return make


def folder_name(variant: str) -> str:
    """Returns the name of the folder for the images of a variant."""
    return re.sub(r"[^a-z0-9.+]+", "-", variant.lower()).strip("-")


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _frames(output: Any, count: int) -> list[list[Image.Image]]:
    if hasattr(output, "frames"):
        return [_pil_images(frames) for frames in output.frames]
    images = getattr(output, "images", None)
    if images is None:
        raise TypeError(f"{type(output).__name__}: expected images or frames")
    return [[image] for image in _pil_images(images)] if len(images) == count else [_pil_images(images)]


def _pil_images(images: Any) -> list[Image.Image]:
    if isinstance(images, np.ndarray):
        from diffusers.image_processor import VaeImageProcessor

        images = VaeImageProcessor.numpy_to_pil(images)
    return [image.convert("RGB") for image in images]


class StoredImages:
    """Images in a folder written by `fdcompile.tools.generate`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines = {line["number"]: line for line in ResultStore(folder, 0).news() if "file" in line}

    def has(self, caption: Caption) -> bool:
        return caption.number in self._lines

    def read(self, caption: Caption) -> Images:
        """Reads the frames of one output, uint8 ``[frames, height, width, 3]``."""
        line = self._lines[caption.number]
        strip = np.asarray(_opened(self._folder / line["file"]))
        frames: Images = strip.reshape(line.get("frames", 1), -1, *strip.shape[1:])
        return frames

    def batches(self, captions: Iterable[Caption]) -> Iterator[tuple[list[Caption], Images]]:
        """Yields the stored frames in batches, with a caption for each frame."""
        stored = filter(self.has, captions)
        while batch := list(itertools.islice(stored, _TOGETHER)):
            frames = [self.read(caption) for caption in batch]
            yield [caption for caption, of in zip(batch, frames, strict=True) for _ in of], np.concatenate(frames)


def real_images(folder: Path) -> list[Path]:
    """Lists the images in a folder.

    Raises:
        ValueError: the folder has fewer than two images.
    """
    known = Image.registered_extensions()
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in known)
    if len(paths) < 2:
        raise ValueError(f"{folder}: {len(paths)} images, expected at least 2")
    return paths


def read_each(paths: Iterable[Path]) -> Iterator[Images]:
    """Reads images one at a time, since their sizes differ, as uint8 ``[1, height, width, 3]``."""
    for path in paths:
        yield np.asarray(_opened(path))[None]
