"""Reads prompts from a file that may not fit into memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """One image to make.

    Attributes:
        number: its line, from 0 on.
        text: the prompt.
        seed: seed of the noise.
    """

    number: int
    text: str
    seed: int


@dataclass(frozen=True)
class BadLine:
    """A line that is not a prompt, with the reason."""

    number: int
    why: str


def read_prompts(lines: Iterable[bytes], seed: int, as_json: bool) -> Iterator[Prompt | BadLine]:
    """Yields a prompt for each of `lines`, skipping empty lines.

    The seed of a line is `seed` plus the number of the line, unless the line has its own seed. So an image depends
    neither on other lines nor on the process that makes it.

    Args:
        lines: UTF-8 text, or with `as_json` objects with a ``prompt`` and optionally a ``seed``.
        seed: seed of line 0.
        as_json: whether lines are JSON objects.
    """
    for number, line in enumerate(lines):
        try:
            text = line.decode("utf-8-sig" if number == 0 else "utf-8").strip()
            if not text:
                continue
            yield _of_json(number, text, seed + number) if as_json else Prompt(number, text, seed + number)
        except ValueError as error:
            yield BadLine(number, f"line {number + 1}: {error}")


def _of_json(number: int, text: str, seed: int) -> Prompt:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"{text[:60]!r} is no object with a prompt")
    prompt = values.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt={prompt!r}: expected a text")
    if unknown := values.keys() - {"prompt", "seed"}:
        raise ValueError(f"{sorted(unknown)[0]!r} is not known: expected prompt and seed")
    given = values.get("seed", seed)
    if type(given) is not int or not 0 <= given < 2**63:
        raise ValueError(f"seed={given!r}: expected a whole number from 0 to 2**63 - 1")
    return Prompt(number, prompt, given)
