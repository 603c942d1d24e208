"""Checks that a pipeline can be optimized."""

from __future__ import annotations

from typing import Any


def check_pipe(pipe: Any) -> None:
    """Checks that `pipe` has a diffusers UNet and a scheduler.

    Raises:
        TypeError: a part is missing or unsupported; the message names it.
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
        if isinstance(kind := getattr(pipe, part), type):
            raise TypeError(f"{part} is the class {kind.__name__}: expected an instance of it")
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


def number_of_levels(pipe: Any) -> int:
    """Number of levels of the UNet of `pipe`; 1 if there is no pipe yet, or for a UNet that `check_pipe` refuses."""
    return len(getattr(getattr(pipe, "unet", None), "up_blocks", ())) or 1
