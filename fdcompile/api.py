"""The public verbs: optimize, restore, explain."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, TypeVar

from torch import nn

from fdcompile.config import Config
from fdcompile.report import Report

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
    from fdcompile.hooks import UNetHook, find_hook

    previous = find_hook(pipe)
    restore(pipe)
    try:
        hook = UNetHook(owner, config)
        hook.attach()
    except BaseException:
        if previous is not None:
            previous.attach()
        raise
    if previous is not None and previous.unet is unet and previous.executor.packaged is None:
        hook.executor.adopt(previous.executor)
    return pipe


def restore(pipe: Pipeline) -> Pipeline:
    """Takes everything that `optimize` added off `pipe` and returns it; does nothing on a stock pipeline."""
    from fdcompile.hooks import find_hook

    hook = find_hook(pipe)
    if hook is not None:
        hook.detach()
    return pipe


def explain(pipe: Any) -> Report:
    """What the last run of an optimised `pipe` did: key steps, groups, stage calls, FLOPs, memory, compile time.

    Raises:
        RuntimeError: `pipe` is not optimised, or has not run since.
    """
    from fdcompile.hooks import find_hook

    hook = find_hook(pipe)
    if hook is None:
        raise RuntimeError("this pipe is not optimised: call fdcompile.optimize(pipe) first")
    if hook.executor.run is None:
        raise RuntimeError("this pipe has not run since it was optimised: call it first, then explain")
    return Report.of(hook.executor.run)


def check_pipe(pipe: Any) -> None:
    """Refuses what has no plain diffusers UNet and no scheduler.

    Raises:
        TypeError: naming what is missing.
    """
    name = type(pipe).__name__
    if getattr(pipe, "transformer", None) is not None and getattr(pipe, "unet", None) is None:
        raise TypeError(
            f"{name} runs a transformer, not a UNet: fdcompile has no encoder to skip there. "
            f"diffusers caches transformers itself: pipe.transformer.enable_cache(FirstBlockCacheConfig(...))"
        )
    for part in ("unet", "scheduler"):
        if getattr(pipe, part, None) is None:
            raise TypeError(f"{name} has no {part}: fdcompile.optimize expects a diffusers pipeline with a UNet")
    missing = [block for block in ("down_blocks", "up_blocks", "conv_in", "conv_out") if not hasattr(pipe.unet, block)]
    if missing:
        raise TypeError(f"{type(pipe.unet).__name__} has no {missing[0]}: expected a diffusers UNet")
    if not hasattr(pipe.scheduler, "step"):
        raise TypeError(
            f"{type(pipe.scheduler).__name__} has no step method, which fdcompile follows a run by: "
            f"give {name} another scheduler"
        )
    if hasattr(pipe.unet, "_orig_mod") or getattr(pipe.unet, "_compiled_call_impl", None) is not None:
        raise TypeError(
            f"{name}.unet is compiled already, and fdcompile compiles its stages: give it the plain UNet "
            f"(pipe.unet = pipe.unet._orig_mod, or load it anew) and choose Config(backend='inductor')"
        )
