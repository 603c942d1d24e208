"""Results of a job: a folder with images, a manifest line for each, and the arguments of the job."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from fdcompile.io import atomic_write, write_json
from fdcompile.tools.generate.prompts import Prompt

JOB = "job.json"
SPOOL = ".stdin.txt"
"""File with the prompts from stdin, for several processes."""


class ResultStore:
    """The folder of a job, as used by one of its processes.

    Each process appends to its own manifest, ``manifest-<rank>.jsonl``, since not every file system lets several
    processes append to one file. Images are written atomically, each before its manifest line.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self._manifest = folder / f"manifest-{rank:05}.jsonl"
        self._read: dict[Path, int] = {}

    def begin(self, job: dict[str, Any]) -> None:
        """Creates the folder for images of `job`, or checks that it is one already.

        Raises:
            ValueError: the folder holds images of another job.
            OSError: the folder cannot be created or written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / JOB
        if not path.exists():
            if any(entry.name != SPOOL for entry in self.folder.iterdir()):
                raise ValueError(f"{self.folder} holds something else: choose another folder")
            write_json(path, job)
        self.check(job)

    def check(self, job: dict[str, Any]) -> None:
        """Checks that the folder can be written to and that its images are of `job`.

        Raises:
            ValueError: the images are of another job; the message names a difference.
            OSError: the folder cannot be written to.
        """
        try:
            held = json.loads((self.folder / JOB).read_text(encoding="utf-8"))
            if not isinstance(held, dict):
                raise ValueError("expected an object")
        except ValueError as error:
            raise ValueError(
                f"{self.folder / JOB} cannot be read, so the job of its images is unknown ({error}): "
                f"choose another folder"
            ) from error
        wanted = json.loads(json.dumps(job))
        if different := [name for name in held.keys() | wanted.keys() if held.get(name) != wanted.get(name)]:
            name = min(different)
            raise ValueError(
                f"{self.folder} holds images of another job: {name} was {_short(held.get(name))}, "
                f"not {_short(wanted.get(name))}. Choose another folder"
            )
        self._manifest.open("ab").close()

    def done(self) -> dict[int, int]:
        """Maps the number of each existing image to a checksum of its prompt and seed."""
        there = {entry.name for entry in os.scandir(self.folder)}
        return {
            line["number"]: _checksum(line["prompt"], line["seed"]) for line in self.news() if line.get("file") in there
        }

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Checks that existing images are of the same prompts and seeds.

        Raises:
            ValueError: one is not; the message names the first.
        """
        done = self.done()
        self._read.clear()
        for prompt in prompts:
            if prompt.number in done and not self.is_of(done[prompt.number], prompt):
                raise ValueError(
                    f"{self.folder} holds images of another job: number {prompt.number} is of another prompt or seed "
                    f"than {prompt.text!r}, {prompt.seed}. Choose another folder"
                )

    @staticmethod
    def is_of(checksum: int | None, prompt: Prompt) -> bool:
        """Whether `checksum`, a value of `done`, is that of `prompt`."""
        return checksum == _checksum(prompt.text, prompt.seed)

    def news(self) -> Iterator[dict[str, Any]]:
        """Yields the manifest lines of all processes that were added since the last call."""
        for path in sorted(self.folder.glob("manifest-*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):  # unfinished, or its writer died
                        break
                    self._read[path] = self._read.get(path, 0) + len(line)
                    if (values := _parsed(line)) is not None:
                        yield values | {"manifest": path.name}

    def save(self, prompt: Prompt, image: Image.Image, about: dict[str, Any]) -> None:
        """Writes `image`, then its manifest line, which includes `about`."""
        name = f"{prompt.number:08}.png"
        save_image(image, self.folder / name)
        self._append({"number": prompt.number, "prompt": prompt.text, "seed": prompt.seed, "file": name, **about})

    def fail(self, prompt: Prompt, why: str) -> None:
        """Writes a manifest line with the reason why there is no image of `prompt`."""
        self._append({"number": prompt.number, "prompt": prompt.text, "seed": prompt.seed, "error": why})

    def _append(self, line: dict[str, Any]) -> None:
        with self._manifest.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:  # an earlier process with this rank may have died within a line
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def save_image(image: Image.Image, path: Path) -> None:
    """Writes `image` to `path`, atomically."""
    with atomic_write(path) as partial:
        image.save(partial)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def _checksum(text: str, seed: int) -> int:
    return zlib.crc32(f"{seed} {text}".encode())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
