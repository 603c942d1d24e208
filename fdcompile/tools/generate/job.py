"""The loop over prompts, in one process or in many."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from PIL import Image

from fdcompile.tools.generate.prompts import BadLine, Prompt
from fdcompile.tools.generate.store import ResultStore

_POLL = 0.5
"""Seconds between two reads of the other processes' manifests."""

GIVE_UP = 8
"""Number of consecutive prompts that fail before a process stops, because the pipeline seems to be broken."""

Tell = Callable[[str], None]
"""Callback with messages about failures, once for each reason."""

Progress = Callable[[str, float | None], None]
"""Callback with a description of the current work and the share of all work done, None while unknown."""

Make = Callable[[list[Prompt]], list[Image.Image]]
"""Function that makes an image for each prompt."""


def processes() -> Any:
    """Returns the processes of the job, an ``accelerate.PartialState``."""
    import torch
    from accelerate import PartialState

    cpu, distributed = not torch.accelerator.is_available(), cast(Any, torch.distributed)
    if not distributed.is_torchelastic_launched():
        return PartialState(cpu=cpu)
    # Processes that a launcher starts again find in its store the addresses of those that died.
    store, rank, count = next(distributed.rendezvous("env://"))
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PartialState(cpu=cpu, store=distributed.PrefixStore(life, store), rank=rank, world_size=count)


def open_store(folder: Path, job: dict[str, Any], ranks: Any) -> ResultStore:
    """Opens the results of `job` in `folder`. The main process creates the folder, and all processes check it.

    Raises:
        ValueError, OSError: see `ResultStore.begin`.
    """
    store = ResultStore(folder, ranks.process_index)
    if ranks.is_main_process:
        store.begin(job)
    ranks.wait_for_everyone()
    store.check(job)
    return store


@dataclass
class Summary:
    """Counts of a job.

    Attributes:
        images: number of new images, by manifest.
        failed: number of failed prompts, by manifest.
        seconds: total time of the new images, by manifest.
        skipped: number of images that existed before.
        bad: number of lines that are not prompts.
        wall: duration of the job in seconds.
    """

    images: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    bad: int = 0
    wall: float = 0.0

    @property
    def done(self) -> int:
        return sum(self.images.values()) + sum(self.failed.values())

    def add(self, line: dict[str, Any]) -> None:
        manifest = line["manifest"]
        if "error" in line:
            self.failed[manifest] += 1
        else:
            self.images[manifest] += 1
            self.seconds[manifest] += line["seconds"]


def run(
    make: Make,
    lines: Iterable[Prompt | BadLine],
    store: ResultStore,
    ranks: Any,
    batch: int,
    about: dict[str, Any],
    tell: Tell,
    progress: Progress,
) -> Summary:
    """Generates the images that `store` does not have, `batch` per call in each process.

    Each process reads all of `lines` lazily and takes its share of every joint batch. The prompts of a batch that fails
    are tried one by one.

    Args:
        make: function that calls the pipeline.
        lines: the prompts.
        store: store for the images.
        ranks: the processes.
        batch: number of prompts per call in each process.
        about: further values for the manifest line of each image.
        tell: callback with messages about failures.
        progress: callback in the main process with the number of images done and its share, None while unknown.

    Returns:
        Counts over all processes; outside the main process, those known when its share was done.

    Raises:
        OSError: an image could not be written, for example because the disk is full. Existing images are kept.
        RuntimeError: `GIVE_UP` consecutive prompts failed.
    """
    began = time.perf_counter()
    done = store.done()
    ranks.wait_for_everyone()  # so that all processes see the same images, and split the prompts alike
    summary = Summary()
    wanted = failures = 0
    told = set[str]()  # each reason is reported once, but counted every time

    def missing() -> Iterator[Prompt]:
        nonlocal wanted
        for line in lines:
            if isinstance(line, BadLine):
                summary.bad += 1
                if ranks.is_main_process:
                    tell(line.why)
            elif ResultStore.is_of(done.get(line.number), line):
                summary.skipped += 1
            else:
                wanted += 1
                yield line

    def look(total: int | None = None) -> None:
        for line in store.news():
            summary.add(line)
        if ranks.is_main_process:
            progress(f"{summary.done} images", summary.done / total if total else None)

    prompts = missing()
    while window := list(itertools.islice(prompts, batch * ranks.num_processes)):
        with ranks.split_between_processes(window) as share:
            for why in _make_batch(make, share, store, about) if share else ():
                failures = 0 if why is None else failures + 1
                if why is not None and (reason := why.partition(": ")[2]) not in told:
                    told.add(reason)
                    tell(why)
                if failures == GIVE_UP:
                    raise RuntimeError(f"{GIVE_UP} prompts failed one after the other, the last one at {why}")
        look()
    while ranks.is_main_process and summary.done < wanted:  # a launcher ends this process where another one died
        look(wanted)
        time.sleep(_POLL)
    look(wanted)
    summary.wall = time.perf_counter() - began
    return summary


def _make_batch(make: Make, prompts: list[Prompt], store: ResultStore, about: dict[str, Any]) -> Iterator[str | None]:
    """Yields None for each image made, and the reason for each prompt that failed."""
    began = time.perf_counter()
    try:
        images = make(prompts)
    except Exception as error:
        if len(prompts) > 1:
            for prompt in prompts:
                yield from _make_batch(make, [prompt], store, about)
            return
        why = f"{type(error).__name__}: {error}"
        store.fail(prompts[0], why)
        yield f"line {prompts[0].number + 1}: {why}"
        return
    seconds = (time.perf_counter() - began) / len(prompts)
    for prompt, image in zip(prompts, images, strict=True):
        store.save(prompt, image, about | {"seconds": round(seconds, 4)})
        yield None
