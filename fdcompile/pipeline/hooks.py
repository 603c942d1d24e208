"""Attach to a stock diffusers pipeline, and leave it again without a trace."""

from __future__ import annotations

import copy
import functools
from typing import Any, NoReturn

from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from fdcompile.backends import resolve_backend
from fdcompile.capture.structure import Structure
from fdcompile.config import Config, NoiseInjection
from fdcompile.pipeline.controlnet import ControlNetHook
from fdcompile.pipeline.noise import PriorNoise
from fdcompile.runtime.clock import Clock
from fdcompile.runtime.executor import Executor
from fdcompile.runtime.programs import CapturedPrograms, Programs

HOOK_NAME = "fdcompile"


class UNetHook(ModelHook):  # type: ignore[misc]  # diffusers is untyped
    """Hands every call of the UNet to the executor, and sees every step of the pipeline's scheduler."""

    def __init__(self, pipe: Any, config: Config, programs: Programs | None = None) -> None:
        super().__init__()
        self.unet = pipe.unet
        self.config = config
        self._pipe = pipe
        self._watched: Any = None
        self._installed: list[tuple[nn.Module, ModelHook]] = []
        clock = Clock(lambda: self._pipe.scheduler)
        if programs is None:
            backend = functools.partial(resolve_backend, config.backend)
            programs = CapturedPrograms(pipe.unet, Structure(pipe.unet), config, backend)
        self.executor = Executor(pipe.unet, config, clock, programs, self._announced_steps)
        self.noise = _prior_noise(config, self.executor, pipe)
        controlnet = getattr(pipe, "controlnet", None)
        self._controlnet = controlnet if isinstance(controlnet, nn.Module) else None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._pipe.scheduler is not self._watched:
            self._leave_scheduler()
            self._watch_scheduler()
        assert self.fn_ref.original_forward is not None
        # Weights that are offloaded as a whole are brought in by accelerate, whose wrapper is inside if it came first.
        offload = getattr(module, "_hf_hook", None) if _is_accelerate(self.fn_ref.original_forward) else None
        if offload is not None:
            args, kwargs = offload.pre_forward(module, *args, **kwargs)
        output = self.executor(self.fn_ref.original_forward, args, kwargs)
        return offload.post_forward(module, output) if offload is not None else output

    def attach(self) -> None:
        """Installs everything, or nothing if it fails."""
        try:
            self._install(self.unet, self)
            if self._controlnet is not None:
                hook = ControlNetHook(self.executor)
                self.executor.complete = hook.complete
                self._install(self._controlnet, hook)
            self._watch_scheduler()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        while self._installed:
            _remove(*self._installed.pop())
        if self._watched is not None:
            self._leave_scheduler()

    def _install(self, module: nn.Module, hook: ModelHook) -> None:
        self._installed.append((module, hook))
        _register(module, hook)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "an optimised pipe cannot be copied or pickled: call fdcompile.restore(pipe) before, then again"
        )

    def _announced_steps(self) -> int | None:
        """How many steps a pipeline that stops early (``denoising_end``) has said it will run."""
        stops_early = getattr(self._pipe, "_denoising_end", None) is not None
        return getattr(self._pipe, "_num_timesteps", None) if stops_early else None

    def _watch_scheduler(self) -> None:
        self._watched = self._pipe.scheduler
        self._watched.step = WatchedStep(self)

    def _leave_scheduler(self) -> None:
        if isinstance(step := vars(self._watched).get("step"), WatchedStep):
            step.leave()


class WatchedStep:
    """Stands in for ``scheduler.step``."""

    def __init__(self, hook: UNetHook) -> None:
        self.hook = hook
        self._scheduler = hook._pipe.scheduler
        users = vars(self._scheduler).get("step")
        # A copy of a watched scheduler has its class's own method among its attributes.
        self._users = None if getattr(users, "__func__", None) is type(self._scheduler).step else users
        self._stock = self._scheduler.step
        functools.update_wrapper(self, self._stock)

    def __call__(self, model_output: Any, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.hook.noise is not None:
            sample = self.hook.noise.inject(sample, self._scheduler)
        result = self._stock(model_output, timestep, sample, *args, **kwargs)
        self.hook.executor.clock.scheduler_stepped()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied scheduler, which some pipelines make for themselves, steps itself; copied state is this one's."""
        return copy.deepcopy(self._stock, memo) if id(self._scheduler) in memo else self

    def leave(self) -> None:
        del self._scheduler.step
        if self._users is not None:
            self._scheduler.step = self._users


def _register(module: nn.Module, hook: ModelHook) -> None:
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if registry.get_hook(HOOK_NAME) is not None:
        raise ValueError(
            f"this {type(module).__name__} is part of another optimised pipe: "
            f"call fdcompile.restore on that one first, or give each pipe one of its own"
        )
    registry.register_hook(hook, HOOK_NAME)
    hook.installed = module.forward


def _remove(module: nn.Module, hook: ModelHook) -> None:
    registry: Any = getattr(module, "_diffusers_hook", None)
    if registry is None:
        return
    if registry.get_hook(HOOK_NAME) is hook:
        _take_off(module, hook, registry)
    if not registry.hooks:
        del module._diffusers_hook
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward


def _take_off(module: nn.Module, hook: Any, registry: Any) -> None:
    outer = module.forward
    registry.remove_hook(HOOK_NAME, recurse=False)
    if outer is not hook.installed:  # offloading was switched on or off since, or another hook of diffusers' was added
        module.forward = outer
        if vars(module).get("_old_forward") is hook.installed:
            module._old_forward = hook.fn_ref.original_forward


def _is_accelerate(forward: Any) -> bool:
    return isinstance(forward, functools.partial) and forward.func.__module__ == "accelerate.hooks"


def _prior_noise(config: Config, executor: Executor, pipe: Any) -> PriorNoise | None:
    if config.noise_injection is None:
        return None
    if isinstance(config.noise_injection, NoiseInjection):
        return PriorNoise(config.noise_injection, executor, text_to_image_only=False)
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    latent_text_to_image = type(pipe) in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values() and hasattr(pipe, "vae")
    return PriorNoise(NoiseInjection(), executor, text_to_image_only=True) if latent_text_to_image else None


def find_hook(pipe: Any) -> UNetHook | None:
    """What `optimize` has attached, also where ``pipe.unet`` has been replaced since."""
    unet = pipe if isinstance(pipe, nn.Module) else getattr(pipe, "unet", None)
    registry = getattr(unet, "_diffusers_hook", None)
    hook = registry.get_hook(HOOK_NAME) if registry is not None else None
    if hook is None:
        step = getattr(getattr(pipe, "scheduler", None), "step", None)
        hook = step.hook if isinstance(step, WatchedStep) else None
    return hook
