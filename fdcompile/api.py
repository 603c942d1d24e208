"""The public verbs: optimize, warmup, restore, explain."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from fdcompile.config import Config
from fdcompile.pipeline.check import check_pipe
from fdcompile.pipeline.exchange import exchange
from fdcompile.pipeline.plans import as_config
from fdcompile.pipeline.record import record_call
from fdcompile.pipeline.session import Session, find_session, sessions_of
from fdcompile.report import Report
from fdcompile.runtime.caller import unwrap
from fdcompile.runtime.layout import restore_layout

Pipeline = TypeVar("Pipeline")


class Plan(Protocol):
    """What `fdcompile.plan` returns, as far as it is used here."""

    def best(self) -> Config: ...


def optimize(pipe: Pipeline, config: Config | Plan | None = None, *, scheduler: Any = None, **options: Any) -> Pipeline:
    """Makes `pipe` run its UNet step-aware and returns it: same object, same class, same call.

    The UNet is captured at its first call of each signature, sorted by when its values are known, and run with its
    encoder at key steps only (Faster Diffusion, Sec. 3.3). Optimising again replaces the configuration, and compiles
    nothing again unless ``recompute``, ``backend`` or ``disabled_passes`` changes.

    What is optimised is a UNet under a scheduler. Pipes that share both (``Other.from_pipe(pipe)``) are switched on and
    off together, and have one configuration; those that share only one of them do not touch each other.

    Args:
        pipe: a diffusers pipeline with a ``unet`` and a ``scheduler``; or, with `scheduler`, a UNet for a sampling loop
            of one's own, which hands it the elements of ``scheduler.timesteps``. `restore` and `explain` take either.
        config: see `Config`; the default chooses key steps for the schedule and forecasts the UNet's output between
            them; ``Config.paper()`` is encoder propagation at the paper's key steps. For a model that is used often a
            `plan` is worth its time: give it, or one of its configs. A plan stands for its recommended point. One that
            was made for another UNet or scheduler warns, or is refused with ``Config(strict=True)``; to compare, all
            weights of the UNet are read.
        scheduler: of the loop, where `pipe` is a UNet.
        options: none; those of `Config` are refused with a word of where they belong.

    Raises:
        TypeError: `pipe` has no UNet (a transformer pipeline has diffusers' own caches) or no scheduler with a ``step``
            method, the UNet is compiled already, or `config` is no `Config`.
        ValueError: a module named in ``config.recompute`` does not exist, a plan recommends fewer steps of the stock
            pipeline, or it is refused as above. What was optimised before stays so.
    """
    if options:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise TypeError(f"optimize takes its options as a Config: fdcompile.optimize(pipe, fdcompile.Config({given}))")
    config = as_config(config)
    owner: Any = pipe
    if isinstance(pipe, nn.Module):
        if scheduler is None:
            raise TypeError(f"{type(pipe).__name__} is no pipeline: call fdcompile.optimize(unet, scheduler=scheduler)")
        owner = SimpleNamespace(unet=pipe, scheduler=scheduler)
    elif scheduler is not None:
        raise TypeError("scheduler goes with a UNet: a pipeline has its own, and may change it")
    check_pipe(owner)
    unet = owner.unet
    modules = {name for name, _ in unet.named_modules()} | {"conv_norm_out", "conv_act"}  # some UNets lack the latter
    if unknown := [path for path in config.recompute if path not in modules]:
        raise ValueError(f"recompute={list(config.recompute)}: {type(unet).__name__} has no module {unknown[0]!r}")
    exchange(find_session(owner), Session(owner, config))
    return pipe


def warmup(pipe: Any, sizes: Sequence[tuple[int, int]], *, batch: Sequence[int] = (1,), **arguments: Any) -> None:
    """Draws a batch of each size, so that no later call like it captures, compiles or records anything.

    Those are calls of these sizes with as many pictures and `arguments` of the same kinds. A program for any batch
    serves all of `batch`; on CUDA each batch and number of steps is recorded apart. The pipe's progress bar is shown.

    Args:
        pipe: an optimised pipeline.
        sizes: height and width in pixels of the pictures to come.
        batch: numbers of pictures a call.
        arguments: of the calls to come, such as ``num_inference_steps=20, guidance_scale=7.5``; by default a prompt if
            the pipeline takes one.

    Raises:
        RuntimeError: `pipe` is not optimised.
        ValueError: the pipeline takes no such argument, makes no pictures of a size, or its ``cache_size_limit``
            is less than the number of sizes. Nothing has been captured then. Or it is less than the number of graphs,
            where the batch of a graph is fixed.
        CaptureError: the UNet cannot be exported.
    """
    session = _session_of(pipe)
    _check_warmup(sizes, batch)
    most = session.config.cache_size_limit
    if most is not None and len(set(sizes)) > most:
        raise ValueError(f"{len(set(sizes))} sizes: Config(cache_size_limit={most}) would drop some of them again")
    calls = [
        {"height": height, "width": width} | _pictures(pipe, arguments, count)
        for (height, width), count in itertools.product(sizes, batch)
    ]
    for call in calls:
        record_call(pipe, call["height"], call["width"], call)
    held, dropped = _programs(pipe)
    for call in pipe.progress_bar(calls):
        pipe(**call)
    lost = _programs(pipe)[1] - dropped - held  # besides those that were there before
    if lost > 0:
        raise ValueError(
            f"Config(cache_size_limit={most}) has dropped {lost} of the graphs of these calls again: where the UNet is "
            f"captured at a fixed batch they need one for each size and batch, {len(calls)}"
        )


def _session_of(pipe: Any) -> Session:
    session = find_session(pipe)
    if session is None:
        raise RuntimeError("this pipe is not optimised: call fdcompile.optimize(pipe) first")
    return session


def _programs(pipe: Any) -> tuple[int, int]:
    """How many are held, and how many have been dropped."""
    try:
        report = explain(pipe)
    except RuntimeError:  # it has not run yet
        return 0, 0
    return report.programs_held, report.programs_dropped


def _check_warmup(sizes: Any, batch: Any) -> None:
    """Refuses what is no list of sizes or of batches."""

    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    def is_list(values: Any) -> bool:
        return isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0

    if not is_list(sizes) or not all(is_list(size) and len(size) == 2 and all(map(is_count, size)) for size in sizes):
        raise ValueError(f"sizes={sizes!r}: expected a list of heights and widths in pixels such as [(512, 512)]")
    if not is_list(batch) or not all(map(is_count, batch)):
        raise ValueError(f"batch={batch!r}: expected a list of numbers of pictures such as [1, 4]")


def _pictures(pipe: Any, arguments: dict[str, Any], count: int) -> dict[str, Any]:
    """What to call `pipe` with for `count` pictures that nobody looks at; the size aside."""
    parameters = inspect.signature(pipe.__call__).parameters
    defaults = {"output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    if not arguments:
        defaults["prompt"] = "a photograph"
    if count > 1:
        if "num_images_per_prompt" not in parameters:
            raise ValueError(f"batch={count}: {type(pipe).__name__} takes no num_images_per_prompt: give batch=[1]")
        defaults["num_images_per_prompt"] = count
    return {name: value for name, value in defaults.items() if name in parameters} | arguments


def restore(pipe: Pipeline) -> Pipeline:
    """Takes everything that `optimize` added off `pipe` and returns it; does nothing on a stock pipeline."""
    for session in sessions_of(pipe) if isinstance(pipe, nn.Module) else filter(None, [find_session(pipe)]):
        session.detach()
        if not sessions_of(session.unet):
            restore_layout(session.unet)
    return pipe


def explain(pipe: Any) -> Report:
    """What the last run of an optimised `pipe` did: key steps, groups, stage calls, FLOPs, memory, compile time.

    Raises:
        RuntimeError: `pipe` is not optimised, or has not run since.
    """
    session = _session_of(pipe)
    if not isinstance(pipe, nn.Module) and unwrap(pipe.unet) is not session.unet:
        raise RuntimeError(
            "pipe.unet was replaced since this pipe was optimised, and the new one runs as it is: "
            "call fdcompile.optimize(pipe) again"
        )
    if session.executor.record is None:
        raise RuntimeError("this pipe has not run since it was optimised: call it first, then explain")
    return Report.of(session.executor.record)
