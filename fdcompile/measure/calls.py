"""Calls of a pipeline that are checked, and repeated with the same noise."""

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
from torch.utils.hooks import RemovableHandle

from fdcompile.measure.metrics import Pictures
from fdcompile.runtime.caller import Caller, Guidance
from fdcompile.runtime.clock import Clock, Position

PROMPTS_TOGETHER = 4
"""Prompts that make one call of the pipeline."""

Call = dict[str, Any]
"""Keyword arguments of a pipeline."""

OutputHook = Callable[[Position, Tensor], Tensor]
"""Is shown each output of the UNet, in the order of its calls, and returns what the pipeline is to have instead."""


@dataclass(frozen=True)
class Output:
    """Output of a pipeline call.

    Attributes:
        latents: what the scheduler's last step returned, shape ``[pictures, ...]``.
        pictures: of a pipeline that returns pictures, else None.
        steps: how many the scheduler took.
        guidance: smallest and largest guidance scale, None where the pipeline says none.
    """

    latents: Tensor
    pictures: Pictures | None
    steps: int
    guidance: Guidance | None


def parse_calls(pipe: Any, calls: Sequence[str | Call], common: Call, least: int = 1) -> list[Call]:
    """The calls as keyword arguments, `common` ones included.

    Each prompt becomes a call. In a pipeline that takes a generator, a call without one gets its own seed.

    Raises:
        TypeError, ValueError: `calls` are neither prompts nor calls, fewer than `least`, or hold an argument that the
            pipeline has not.
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
    """`single`, the parsed `calls`; those of prompts are joined, up to `PROMPTS_TOGETHER` in one call."""
    together = PROMPTS_TOGETHER if isinstance(calls[0], str) else 1
    return [_merge(single[first : first + together]) | common for first in range(0, len(single), together)]


def split_calls(pipe: Any, calls: Sequence[str | Call], common: Call) -> tuple[list[Call], list[Call]]:
    """Splits the calls into those to fit to, the first half, and held-out ones, both in batches.

    Raises:
        TypeError, ValueError: as `parse_calls`, or there is only one.
    """
    single = parse_calls(pipe, calls, common, least=2)
    half = (len(single) + 1) // 2
    return in_batches(calls, single[:half], common), in_batches(calls, single[half:], common)


def _merge(calls: list[Call]) -> Call:
    if len(calls) == 1:
        return calls[0]
    return {name: [call[name] for call in calls] for name in calls[0]}


def make(pipe: Any, call: Call, see: OutputHook | None = None) -> Output:
    """Calls `pipe` with the noise that `call` started with, and passes the outputs of its UNet to the hook `see`.

    Raises:
        ValueError: `see` is given, and the UNet is called with a timestep that is none of the scheduler's.
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
        if see is not None:
            around.callback(_show(pipe, clock, see).remove)
        output = pipe(**call)
    return Output(samples[-1].float().cpu(), _pictures(output), len(samples), Caller(pipe).guidance)


@contextmanager
def _noise_of(call: Call) -> Iterator[None]:
    """Seeds torch's global generator in the block, and restores it and the call's generators afterwards."""
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
    """Passes what each step of `scheduler` returns to `stepped`."""
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


def _show(pipe: Any, clock: Clock, see: OutputHook) -> RemovableHandle:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        position = clock.locate(args[1] if len(args) > 1 else kwargs["timestep"], pipe.scheduler.timesteps)
        if position is None:
            raise ValueError(
                f"{type(pipe).__name__} calls its UNet with a timestep that is not an element of scheduler.timesteps: "
                f"without a schedule there is nothing to plan"
            )
        seen = see(position, output[0])
        return (seen, *output[1:]) if isinstance(output, tuple) else type(output)(sample=seen)

    handle: RemovableHandle = pipe.unet.register_forward_hook(hook, with_kwargs=True)
    return handle


def _pictures(output: Any) -> Pictures | None:
    """The pictures in a pipeline's output as uint8, if it is a list of pictures of one size."""
    images = getattr(output, "images", None)
    if not isinstance(images, list) or not all(hasattr(image, "convert") for image in images):
        return None
    return as_pictures(images)


def seeded(prompts: Sequence[str], seed: int, **common: Any) -> Call:
    """One call for `prompts`; picture ``i`` starts from noise of seed ``seed + i``, whatever the batch."""
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(prompts))]
    return {"prompt": list(prompts), "generator": generators, **common}


def sample(pipe: Any, prompts: Sequence[str], seed: int = 0, batch: int | None = None, **common: Any) -> Pictures:
    """Pictures of `prompts`, `batch` in a call, with noise as `seeded` has it."""
    size = batch or len(prompts)
    return np.concatenate(
        [
            as_pictures(pipe(**seeded(prompts[first : first + size], seed + first, **common)).images)
            for first in range(0, len(prompts), size)
        ]
    )


def as_pictures(images: Sequence[Any]) -> Pictures:
    """PIL pictures of one size as uint8 ``[pictures, height, width, 3]``."""
    return np.stack([np.asarray(image.convert("RGB")) for image in images])
