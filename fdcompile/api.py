"""Public functions: `optimize`, `warmup`, `restore` and `explain`."""

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


class SupportsBest(Protocol):
    """Interface of the plans that `fdcompile.plan` returns."""

    def best(self) -> Config: ...


def optimize(
    pipe: Pipeline, config: Config | SupportsBest | None = None, *, scheduler: Any = None, **options: Any
) -> Pipeline:
    """Optimizes the UNet of `pipe` in place. Class and call of the pipeline are unchanged.

    The UNet is captured at its first call of each signature and divided into stages by the binding times of its values.
    All of it, or with a cut its encoder (Faster Diffusion, Sec. 3.3), runs at key steps only. Calling `optimize` again
    replaces the configuration; this compiles the UNet again only if the recomputed modules, the use of forecasts, the
    disabled passes or the backend change.

    An optimization applies to a UNet with a scheduler. Pipelines that share both (``Other.from_pipe(pipe)``) also share
    the optimization and its configuration. Pipelines that share only one of them are independent.

    Args:
        pipe: a diffusers pipeline with a ``unet`` and a ``scheduler``; or, with `scheduler`, the UNet of a custom
            sampling loop, which must pass elements of ``scheduler.timesteps`` to it. `restore` and `explain` accept
            both.
        config: a `Config`, or a plan for its recommended configuration. The default chooses key steps for the schedule
            and forecasts the UNet's output between them; ``Config.paper()`` is encoder propagation at the paper's key
            steps. For a model that is used often, a `plan` is worth its time. If the plan was made for another UNet or
            scheduler, a warning is issued or, with ``Config(strict=True)``, an error is raised; the comparison reads
            all weights of the UNet.
        scheduler: scheduler of the sampling loop, if `pipe` is a UNet.
        options: not supported; options of `Config` raise an error that shows where to pass them.

    Returns:
        `pipe`.

    Raises:
        TypeError: `pipe` has no UNet (transformer pipelines have diffusers' own caches) or no scheduler with a ``step``
            method, the UNet is already compiled, or `config` is no `Config`.
        ValueError: a module in ``config.recompute`` does not exist, a plan recommends the stock pipeline with fewer
            steps, or ``strict`` is set and the plan is for another UNet or scheduler. A previous optimization remains.
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
    """Calls `pipe` for each size and batch, so that later calls need not capture, compile or record anything.

    This holds for calls of the same sizes and numbers of images, with `arguments` of the same kinds. A program with
    a symbolic batch size serves all of `batch`; on CUDA each batch size and number of steps is recorded separately.
    The pipeline's progress bar is shown.

    Args:
        pipe: an optimized pipeline.
        sizes: heights and widths of the images in pixels.
        batch: numbers of images per call.
        arguments: arguments of later calls, such as ``num_inference_steps=20, guidance_scale=7.5``; by default a prompt
            if the pipeline has one.

    Raises:
        RuntimeError: `pipe` is not optimized.
        ValueError: the pipeline does not accept an argument or a size, or ``cache_size_limit`` is less than the number
            of sizes; these are raised before any capture. Or ``cache_size_limit`` is less than the number of graphs of
            a UNet that is captured with fixed batch sizes.
        CaptureError: the UNet cannot be exported.
    """
    session = _session_of(pipe)
    _check_warmup(sizes, batch)
    most = session.config.cache_size_limit
    if most is not None and len(set(sizes)) > most:
        raise ValueError(f"{len(set(sizes))} sizes: Config(cache_size_limit={most}) would drop some of them again")
    calls = [
        {"height": height, "width": width} | _images(pipe, arguments, count)
        for (height, width), count in itertools.product(sizes, batch)
    ]
    for call in calls:
        record_call(pipe, call["height"], call["width"], call)
    held, dropped = _programs(pipe)
    for call in pipe.progress_bar(calls):
        pipe(**call)
    lost = _programs(pipe)[1] - dropped - held  # not counting programs from before
    if lost > 0:
        raise ValueError(
            f"Config(cache_size_limit={most}) has dropped {lost} of the graphs of these calls again: where the UNet is "
            f"captured at a fixed batch they need one for each size and batch, {len(calls)}"
        )


def _session_of(pipe: Any) -> Session:
    session = find_session(pipe)
    if session is None:
        raise RuntimeError("this pipe is not optimized: call fdcompile.optimize(pipe) first")
    return session


def _programs(pipe: Any) -> tuple[int, int]:
    """Numbers of programs that are held and that have been dropped."""
    try:
        report = explain(pipe)
    except RuntimeError:  # the pipe has not run yet
        return 0, 0
    return report.programs_held, report.programs_dropped


def _check_warmup(sizes: Any, batch: Any) -> None:
    """Checks the types of `sizes` and `batch`."""

    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    def is_list(values: Any) -> bool:
        return isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0

    if not is_list(sizes) or not all(is_list(size) and len(size) == 2 and all(map(is_count, size)) for size in sizes):
        raise ValueError(f"sizes={sizes!r}: expected a list of heights and widths in pixels such as [(512, 512)]")
    if not is_list(batch) or not all(map(is_count, batch)):
        raise ValueError(f"batch={batch!r}: expected a list of numbers of images such as [1, 4]")


def _images(pipe: Any, arguments: dict[str, Any], count: int) -> dict[str, Any]:
    """Arguments, apart from the size, of a call for `count` images, which are not decoded."""
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
    """Removes everything that `optimize` added to `pipe`, and returns it. Does nothing on a stock pipeline."""
    for session in sessions_of(pipe) if isinstance(pipe, nn.Module) else filter(None, [find_session(pipe)]):
        session.detach()
        if not sessions_of(session.unet):
            restore_layout(session.unet)
    return pipe


def explain(pipe: Any) -> Report:
    """Reports on the last run of an optimized `pipe`: key steps, groups, stage calls, FLOPs, memory, compile time.

    Raises:
        RuntimeError: `pipe` is not optimized, or has not run since.
    """
    session = _session_of(pipe)
    if not isinstance(pipe, nn.Module) and unwrap(pipe.unet) is not session.unet:
        raise RuntimeError(
            "pipe.unet was replaced since this pipe was optimized, and the new one runs as it is: "
            "call fdcompile.optimize(pipe) again"
        )
    if session.executor.record is None:
        raise RuntimeError("this pipe has not run since it was optimized: call it first, then explain")
    return Report.of(session.executor.record)
