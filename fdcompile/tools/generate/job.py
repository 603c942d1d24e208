"""The loop over prompts, in one process or in many."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from fdcompile.tools.generate.prompts import BadLine, Prompt
from fdcompile.tools.generate.store import Ledger

_POLL = 0.5
"""Seconds between looks at what the others have made."""

GIVE_UP = 8
"""Prompts that fail one after the other before a process takes it for the pipeline's fault and stops."""

Make = Callable[[list[Prompt]], list[Image.Image]]
"""A picture for each prompt."""


class Ranks(Protocol):
    """``accelerate.PartialState``, as far as it is used."""

    num_processes: int
    is_main_process: bool

    def split_between_processes(self, inputs: list[Prompt]) -> Any: ...

    def wait_for_everyone(self) -> None: ...


@dataclass
class Tally:
    """What came of a job.

    Attributes:
        pictures: how many each manifest has got.
        failed: how many of its prompts gave none.
        seconds: that its pictures took.
        skipped: how many were there before.
        bad: lines that are no prompt.
        wall: seconds that all of it took.
    """

    pictures: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    bad: int = 0
    wall: float = 0.0

    @property
    def done(self) -> int:
        return sum(self.pictures.values()) + sum(self.failed.values())

    def add(self, line: dict[str, Any]) -> None:
        manifest = line["manifest"]
        if "error" in line:
            self.failed[manifest] += 1
        else:
            self.pictures[manifest] += 1
            self.seconds[manifest] += line["seconds"]


def run(
    make: Make,
    lines: Iterable[Prompt | BadLine],
    ledger: Ledger,
    ranks: Ranks,
    batch: int,
    about: dict[str, Any],
    tell: Callable[[str], None],
    progress: Callable[[int, int | None], None],
) -> Tally:
    """Makes the pictures that `ledger` does not have, `batch` at once in each process.

    All processes read all of `lines`, as many as they work on and no further, and each takes its share of every batch
    of theirs. Where a batch fails its prompts are tried one by one.

    Args:
        make: the pipeline's call.
        lines: the prompts.
        ledger: where pictures go.
        ranks: the processes.
        batch: pictures at once in each.
        about: what a picture's line says of how it was made.
        tell: is told of what goes wrong.
        progress: is told how many are done, and of how many once that is known, in the main process.

    Returns:
        What all processes have done; in others than the main one, what was known when their own share was.

    Raises:
        OSError: a picture could not be written, as on a full disk. What is there stays.
        RuntimeError: `GIVE_UP` prompts failed one after the other.
    """
    began = time.perf_counter()
    done = ledger.done()
    ranks.wait_for_everyone()  # so that all have seen the same, and split the same
    tally = Tally()
    wanted = failures = 0

    def missing() -> Iterator[Prompt]:
        nonlocal wanted
        for line in lines:
            if isinstance(line, BadLine):
                tally.bad += 1
                if ranks.is_main_process:
                    tell(line.why)
            elif Ledger.is_of(done.get(line.number), line):
                tally.skipped += 1
            else:
                wanted += 1
                yield line

    def look(total: int | None = None) -> None:
        for line in ledger.news():
            tally.add(line)
        if ranks.is_main_process:
            progress(tally.done, total)

    prompts = missing()
    while window := list(itertools.islice(prompts, batch * ranks.num_processes)):
        with ranks.split_between_processes(window) as share:
            for why in _make_batch(make, share, ledger, about) if share else ():
                failures = 0 if why is None else failures + 1
                if why is not None:
                    tell(why)
                if failures == GIVE_UP:
                    raise RuntimeError(f"{GIVE_UP} prompts failed one after the other, the last one at {why}")
        look()
    while ranks.is_main_process and tally.done < wanted:  # a launcher ends this process where another one died
        look(wanted)
        time.sleep(_POLL)
    look(wanted)
    tally.wall = time.perf_counter() - began
    return tally


def _make_batch(make: Make, prompts: list[Prompt], ledger: Ledger, about: dict[str, Any]) -> Iterator[str | None]:
    """None for each picture that was made, and why there is none for each of the others."""
    began = time.perf_counter()
    try:
        pictures = make(prompts)
    except Exception as error:
        if len(prompts) > 1:
            for prompt in prompts:
                yield from _make_batch(make, [prompt], ledger, about)
            return
        why = f"{type(error).__name__}: {error}"
        ledger.fail(prompts[0], why)
        yield f"line {prompts[0].number + 1}: {why}"
        return
    seconds = (time.perf_counter() - began) / len(prompts)
    for prompt, picture in zip(prompts, pictures, strict=True):
        ledger.save(prompt, picture, about | {"seconds": round(seconds, 4)})
        yield None
