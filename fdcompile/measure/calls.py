"""Validates calls of a pipeline, and repeats them with the same noise."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fdcompile.measure.metrics import Images
from fdcompile.runtime.caller import Caller, Guidance
from fdcompile.runtime.clock import Clock, Position

PROMPTS_TOGETHER = 4
"""Number of prompts per call of the pipeline."""

Call = dict[str, Any]
"""Keyword arguments of a pipeline."""

OutputHook = Callable[[Position, Tensor], Tensor]
"""Callback with the position and the output of each UNet call, in order; returns the output for the pipeline."""


@dataclass(frozen=True)
class Output:
    """Output of a pipeline call.

    Attributes:
        latents: result of the scheduler's last step, shape ``[images, ...]``.
        images: images in the pipeline's output; None if it returns none.
        steps: number of steps of the scheduler.
        guidance: smallest and largest guidance scale; None if the pipeline has none.
    """

    latents: Tensor
    images: Images | None
    steps: int
    guidance: Guidance | None


def parse_calls(pipe: Any, calls: Sequence[str | Call], common: Call, least: int = 1) -> list[Call]:
    """Converts `calls` to keyword arguments, one dict for each prompt or call, without `common`.

    If the pipeline takes a generator, a call without one gets its own seed.

    Raises:
        TypeError, ValueError: `calls` are neither prompts nor keyword arguments, or fewer than `least`; or the pipeline
            does not take one of the arguments.
    """
    if isinstance(calls, str | dict):
        raise TypeError(f"calls={calls!r}: expected a list of prompts, or of keyword arguments of the pipeline")
    if len(calls) < least:
        raise ValueError(f"{len(calls)} calls: expected at least {least}")
    prompts = [call for call in calls if isinstance(call, str)]
    single = [{"prompt": call} if isinstance(call, str) else call for call in calls]
    if 0 < len(prompts) < len(calls) or not all(isinstance(call, dict) for call in single):
        raise TypeError("calls: expected prompts only, or dicts of keyword arguments only")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"calls={prompts}: a prompt is empty")
    parameters = inspect.signature(pipe.__call__).parameters
    for name in dict.fromkeys(name for call in (common, *single) for name in call):
        if name not in parameters:
            raise ValueError(f"{type(pipe).__name__} takes no {name}: leave it out")
    if "generator" in parameters:
        single = [{"generator": torch.Generator().manual_seed(seed)} | call for seed, call in enumerate(single)]
    return single


def in_batches(calls: Sequence[str | Call], single: list[Call], common: Call) -> list[Call]:
    """Joins the parsed prompts to calls of up to `PROMPTS_TOGETHER`, and adds `common` to each call.

    Args:
        calls: the calls as given by the user; calls that are not prompts are not joined.
        single: result of `parse_calls`.
        common: keyword arguments of every call.
    """
    together = PROMPTS_TOGETHER if isinstance(calls[0], str) else 1
    batches = (single[first : first + together] for first in range(0, len(single), together))
    return [
        (batch[0] if len(batch) == 1 else {name: [call[name] for call in batch] for name in batch[0]}) | common
        for batch in batches
    ]


def split_calls(pipe: Any, calls: Sequence[str | Call], common: Call) -> tuple[list[Call], list[Call]]:
    """Splits the calls into the first half, to fit to, and the held-out half, both in batches.

    Raises:
        TypeError, ValueError: see `parse_calls`; or there is only one call.
    """
    single = parse_calls(pipe, calls, common, least=2)
    half = (len(single) + 1) // 2
    return in_batches(calls, single[:half], common), in_batches(calls, single[half:], common)


def run_call(pipe: Any, call: Call, output_hook: OutputHook | None = None) -> Output:
    """Calls `pipe` with the same noise each time, and passes the outputs of its UNet to `output_hook`.

    Raises:
        ValueError: `output_hook` is given, and a timestep of a UNet call is not in the schedule.
    """
    clock = Clock()
    samples: list[Tensor] = []

    def stepped(sample: Tensor) -> None:
        clock.scheduler_stepped()
        samples.append(sample)

    with ExitStack() as around:
        around.enter_context(torch.no_grad())
        around.enter_context(_noise_of(call))
        around.enter_context(_stepping(pipe.scheduler, stepped))
        if output_hook is not None:
            hook = functools.partial(_show, pipe, clock, output_hook)
            around.enter_context(pipe.unet.register_forward_hook(hook, with_kwargs=True))
        output = pipe(**call)
    return Output(samples[-1].float().cpu(), _images(output), len(samples), Caller(pipe).guidance)


@contextmanager
def _noise_of(call: Call) -> Iterator[None]:
    """Seeds torch's global generator in the block; restores it and the generators of `call` afterwards."""
    given = call.get("generator") or ()
    generators = [given] if isinstance(given, torch.Generator) else list(given)
    states = [generator.get_state() for generator in generators]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


@contextmanager
def _stepping(scheduler: Any, stepped: Callable[[Tensor], None]) -> Iterator[None]:
    """Passes the result of each step of `scheduler` to `stepped`."""
    replaced, step = vars(scheduler).get("step"), scheduler.step

    @functools.wraps(step)
    def tell(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        stepped(result[0])
        return result

    scheduler.step = tell
    try:
        yield
    finally:
        del scheduler.step
        if replaced is not None:
            scheduler.step = replaced


def _show(
    pipe: Any, clock: Clock, output_hook: OutputHook, unet: nn.Module, args: tuple[Any, ...], kwargs: Call, output: Any
) -> Any:
    position = clock.locate(args[1] if len(args) > 1 else kwargs["timestep"], pipe.scheduler.timesteps)
    if position is None:
        raise ValueError(
            f"{type(pipe).__name__} calls its UNet with a timestep that is not an element of scheduler.timesteps: "
            f"without a schedule there is nothing to plan"
        )
    seen = output_hook(position, output[0])
    return (seen, *output[1:]) if isinstance(output, tuple) else type(output)(sample=seen)


def _images(output: Any) -> Images | None:
    """Returns the images in a pipeline's output as uint8; None unless they are a list of PIL images."""
    images = getattr(output, "images", None)
    if not isinstance(images, list) or not all(hasattr(image, "convert") for image in images):
        return None
    return as_images(images)


def seeded(prompts: Sequence[str], seed: int, **common: Any) -> Call:
    """Makes one call for `prompts`. Image ``i`` starts from noise of seed ``seed + i``, whatever the batch."""
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(prompts))]
    return {"prompt": list(prompts), "generator": generators, **common}


def seeded_batches(prompts: Sequence[str], seed: int, batch: int, **common: Any) -> list[Call]:
    """Makes calls for `prompts`, `batch` per call, with the noise of `seeded`."""
    firsts = range(0, len(prompts), batch)
    return [seeded(prompts[first : first + batch], seed + first, **common) for first in firsts]


def as_images(images: Sequence[Any]) -> Images:
    """Converts PIL images of one size to uint8 ``[images, height, width, 3]``."""
    return np.stack([np.asarray(image.convert("RGB")) for image in images])
