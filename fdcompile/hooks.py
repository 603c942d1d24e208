"""Attach to a stock diffusers pipeline, and leave it again without a trace."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import nn

from fdcompile.backends import resolve_backend
from fdcompile.clock import Clock
from fdcompile.config import Config, NoiseInjection
from fdcompile.executor import Executor
from fdcompile.noise import PriorNoise

HOOK_NAME = "fdcompile"


class UNetHook(ModelHook):  # type: ignore[misc]  # diffusers is untyped
    """Hands every call of the UNet to the executor, and sees every step of the pipeline's scheduler."""

    def __init__(self, pipe: Any, config: Config) -> None:
        super().__init__()
        self.config = config
        self._pipe = pipe
        self._scheduler: Any = None
        self._users_step: Any = None
        self._new_registry = not hasattr(pipe.unet, "_diffusers_hook")
        clock = Clock(lambda: self._pipe.scheduler)
        self.executor = Executor(pipe.unet, config, clock, functools.partial(resolve_backend, config.backend))
        self._noise = _prior_noise(config, self.executor, pipe)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._pipe.scheduler is not self._scheduler:
            self._detach_scheduler()
            self._attach_scheduler()
        assert self.fn_ref.original_forward is not None
        return self.executor(self.fn_ref.original_forward, args, kwargs)

    def attach(self) -> None:
        registry = HookRegistry.check_if_exists_or_initialize(self._pipe.unet)
        registry.register_hook(self, HOOK_NAME)
        self._attach_scheduler()

    def detach(self) -> None:
        unet = self._pipe.unet
        registry = unet._diffusers_hook
        registry.remove_hook(HOOK_NAME, recurse=False)
        if self._new_registry and not registry.hooks:
            del unet._diffusers_hook
        if not registry.hooks and getattr(vars(unet).get("forward"), "__func__", None) is type(unet).forward:
            del unet.forward
        self._detach_scheduler()

    def _attach_scheduler(self) -> None:
        self._scheduler = scheduler = self._pipe.scheduler
        self._users_step = vars(scheduler).get("step")
        stock_step = scheduler.step

        @functools.wraps(stock_step)
        def step(model_output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._noise is not None:
                sample = self._noise.inject(sample, scheduler)
            result = stock_step(model_output, timestep, sample, *args, **kwargs)
            self.executor.clock.scheduler_stepped()
            return result

        scheduler.step = step

    def _detach_scheduler(self) -> None:
        del self._scheduler.step
        if self._users_step is not None:
            self._scheduler.step = self._users_step


def _prior_noise(config: Config, executor: Executor, pipe: Any) -> PriorNoise | None:
    if config.noise_injection is None:
        return None
    if isinstance(config.noise_injection, NoiseInjection):
        return PriorNoise(config.noise_injection, executor, text_to_image_only=False)
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    latent_text_to_image = type(pipe) in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values() and hasattr(pipe, "vae")
    return PriorNoise(NoiseInjection(), executor, text_to_image_only=True) if latent_text_to_image else None


def find_hook(pipe: Any) -> UNetHook | None:
    registry = getattr(getattr(pipe, "unet", None), "_diffusers_hook", None)
    return registry.get_hook(HOOK_NAME) if registry is not None else None
