"""The public verbs: optimize, restore, explain."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, TypeVar

from torch import nn

from fdcompile.config import Config
from fdcompile.pipeline.check import check_pipe
from fdcompile.pipeline.hooks import UNetHook, find_hook
from fdcompile.runtime.report import Report

Pipeline = TypeVar("Pipeline")


def optimize(pipe: Pipeline, config: Config | None = None, *, scheduler: Any = None) -> Pipeline:
    """Makes `pipe` run its UNet step-aware and returns it: same object, same class, same call.

    The UNet is captured at its first call of each signature, sorted by when its values are known, and run with its
    encoder at key steps only (Faster Diffusion, Sec. 3.3). Optimising again replaces the configuration, and compiles
    nothing again unless ``fresh``, ``backend`` or ``disabled_passes`` changes.

    Args:
        pipe: a diffusers pipeline with a ``unet`` and a ``scheduler``; or, with `scheduler`, a UNet for a sampling loop
            of one's own, which hands it the elements of ``scheduler.timesteps``. `restore` and `explain` take either.
        config: see `Config`; the default is encoder propagation at the paper's key steps.
        scheduler: of the loop, where `pipe` is a UNet.

    Raises:
        TypeError: `pipe` has no UNet (a transformer pipeline has diffusers' own caches) or no scheduler with a ``step``
            method, the UNet is compiled already, or `config` is no `Config`.
        ValueError: a module named in ``config.fresh`` does not exist in the UNet, or the pipeline's ControlNet is part
            of another optimised one. What was optimised before stays so.
    """
    config = Config() if config is None else config
    if not isinstance(config, Config):
        raise TypeError(f"config={config!r}: expected a fdcompile.Config")
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
    if unknown := [path for path in config.fresh if path not in modules]:
        raise ValueError(f"fresh={list(config.fresh)}: {type(unet).__name__} has no module {unknown[0]!r}")
    previous = find_hook(pipe)
    restore(pipe)
    try:
        hook = UNetHook(owner, config)
        hook.attach()
    except BaseException:
        if previous is not None:
            previous.attach()
        raise
    if previous is not None and previous.unet is unet:
        hook.executor.adopt(previous.executor)
    return pipe


def restore(pipe: Pipeline) -> Pipeline:
    """Takes everything that `optimize` added off `pipe` and returns it; does nothing on a stock pipeline."""
    hook = find_hook(pipe)
    if hook is not None:
        hook.detach()
    return pipe


def explain(pipe: Any) -> Report:
    """What the last run of an optimised `pipe` did: key steps, groups, stage calls, FLOPs, memory, compile time.

    Raises:
        RuntimeError: `pipe` is not optimised, or has not run since.
    """
    hook = find_hook(pipe)
    if hook is None:
        raise RuntimeError("this pipe is not optimised: call fdcompile.optimize(pipe) first")
    if hook.executor.run is None:
        raise RuntimeError("this pipe has not run since it was optimised: call it first, then explain")
    return Report.of(hook.executor.run)
