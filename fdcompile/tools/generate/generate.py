"""Generates images of many prompts, in one process or several."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fdcompile.pipeline.identity import describe_model
from fdcompile.pipeline.session import find_session
from fdcompile.tools.generate.job import Progress, Summary, Tell, open_store, processes, run
from fdcompile.tools.generate.prompts import BadLine, Prompt

logger = logging.getLogger(__name__)


def generate(
    pipe: Any,
    prompts: Iterable[str | Prompt | BadLine],
    output: str | Path,
    *,
    batch: int = 1,
    seed: int = 0,
    origin: dict[str, Any] | None = None,
    tell: Tell = logger.warning,
    progress: Progress = lambda what, done: None,
    **common: Any,
) -> Summary:
    """Generates the images that `output` does not have yet, in one process or, under torchrun, on many devices.

    Args:
        pipe: a pipeline, stock, optimized or loaded from a package.
        prompts: read lazily; prompt ``i`` starts from noise of seed ``seed + i``, independently of the batch.
        output: folder for the images, a manifest of each process, and ``job.json`` with the arguments of the job.
        batch: number of prompts per call in each process.
        seed: seed of the first prompt.
        origin: further properties that the job in `output` must match, such as the digest of a plan.
        tell: callback with messages about failures, once for each reason.
        progress: callback with a description of the work done and its share of all work, None while unknown.
        common: keyword arguments of every call, such as ``num_inference_steps=20, guidance_scale=5``.

    Returns:
        Counts over all processes in the main process; see `Summary`.

    Raises:
        ValueError: there is no prompt, or `output` holds images of another job or another model.
        OSError: an image cannot be written.
        RuntimeError: many consecutive prompts failed.
    """
    parsed = (Prompt(n, prompt, seed + n) if isinstance(prompt, str) else prompt for n, prompt in enumerate(prompts))
    first = next(parsed, None)
    if first is None:
        raise ValueError("there are no prompts")
    ranks = processes()
    session = find_session(pipe)
    config = None if session is None else session.config.to_dict()
    job = describe_model(pipe) | {"seed": seed, **common, "config": config, **(origin or {})}
    store = open_store(Path(output), job, ranks)
    about = {"config": hashlib.sha256(json.dumps(config).encode()).hexdigest()[:12], **(origin or {})}
    pipe.set_progress_bar_config(disable=True)

    def make(prompts: list[Prompt]) -> Any:
        generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
        output = pipe([prompt.text for prompt in prompts], generator=generators, **common)
        if not hasattr(output, "images"):
            raise TypeError(f"{type(pipe).__name__} makes no images")
        return output.images

    return run(make, itertools.chain([first], parsed), store, ranks, batch, about, tell, progress)
