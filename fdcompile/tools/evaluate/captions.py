"""Captions to evaluate with: lines of text, JSON lines, or the captions of COCO."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdcompile.tools.generate.prompts import BadLine, Prompt, read_prompts


@dataclass(frozen=True)
class Caption(Prompt):
    """A prompt with the file name of its image.

    Attributes:
        file: name of the image in COCO; for other captions, name of the generated image.
    """

    file: str


def read_captions(path: Path, seed: int, most: int | None) -> list[Caption]:
    """Reads the first `most` captions of a file, or all. The seed of caption ``i`` is ``seed + i`` unless given.

    A ``.jsonl`` file has objects with a ``prompt`` and optionally a ``seed``. A ``.json`` file is one of COCO, of which
    the caption with the lowest id of each image is read, in the order of the images' ids. Other files have one
    caption per line.

    Raises:
        ValueError: the file has another format, an invalid line, or fewer captions than `most`.
        OSError: the file cannot be read.
    """
    if path.suffix == ".json":
        captions = list(itertools.islice(_of_coco(path, seed), most))
    else:
        captions = []
        with path.open("rb") as file:
            for line in itertools.islice(read_prompts(file, seed, as_json=path.suffix == ".jsonl"), most):
                if isinstance(line, BadLine):
                    raise ValueError(f"{path}: {line.why}")
                captions.append(caption(line.number, line.text, line.seed))
    if len(captions) < (most or 1):
        raise ValueError(f"{path}: {len(captions)} captions, expected at least {most or 1}")
    return captions


def caption(number: int, text: str, seed: int) -> Caption:
    """Makes a caption whose image is named after its number."""
    return Caption(number, text, seed, f"{number:08}.png")


def _of_coco(path: Path, seed: int) -> Iterator[Caption]:
    try:
        values: Any = json.loads(path.read_bytes())
        files = {int(image["id"]): str(image["file_name"]) for image in values["images"]}
        texts: dict[int, tuple[int, str]] = {}
        for annotation in values["annotations"]:
            entry = int(annotation["id"]), str(annotation["caption"]).strip()
            texts[annotation["image_id"]] = min(entry, texts.get(annotation["image_id"], entry))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no file of COCO captions, with images (id, file_name) and annotations (id, image_id, caption): "
            f"{type(error).__name__}: {error}"
        ) from error
    for number, (image, (_, text)) in enumerate(sorted(texts.items())):
        if image not in files:
            raise ValueError(f"{path}: a caption is of the image {image}, which is not among its images")
        yield Caption(number, text, seed + number, files[image])
