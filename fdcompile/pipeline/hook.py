"""Replaces the forward of a UNet or a ControlNet, and restores it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import nn

HOOK_NAME = "fdcompile"

Forward = Callable[..., Any]


class CallHandler(Protocol):
    """Handles the calls of a hooked module for one session."""

    def knows(self, timestep: Any) -> bool:
        """Whether the session's schedule has `timestep`."""

    def __call__(self, forward: Forward, wrapped: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handles ``forward(*args, **kwargs)``; `wrapped` says whether that is more than the stock forward."""


class ModuleHook(ModelHook):  # type: ignore[misc]  # diffusers is untyped
    """Passes each call of a part to the session whose schedule has its timestep.

    A lock makes calls from several threads take turns, so that a part is not traced while it runs.

    Attributes:
        handlers: one for each session, the most recently used first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.handlers: list[CallHandler] = []
        self._lock = threading.RLock()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Replaces the part's forward."""
        forward = self.fn_ref.original_forward
        assert forward is not None
        with self._lock:
            if not self.handlers:  # it was detached, and a user's wrapper still calls it
                return forward(*args, **kwargs)
            # accelerate loads weights that are offloaded as a whole. Its wrapper is inside of ours if it came first.
            offload = getattr(module, "_hf_hook", None) if _is_accelerate(forward) else None
            inner = vars(module).get("_old_forward", forward) if offload is not None else forward
            wrapped = getattr(inner, "__func__", None) is not type(module).forward
            if offload is not None:
                args, kwargs = offload.pre_forward(module, *args, **kwargs)
            output = self._choose(args, kwargs)(forward, wrapped, args, kwargs)
            return offload.post_forward(module, output) if offload is not None else output

    def _choose(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallHandler:
        if len(self.handlers) > 1:
            timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
            chosen = next((handler for handler in self.handlers if handler.knows(timestep)), self.handlers[0])
            if chosen is not self.handlers[0]:
                self.handlers.remove(chosen)
                self.handlers.insert(0, chosen)
        return self.handlers[0]

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "an optimized pipe cannot be copied or pickled: call fdcompile.restore(pipe) before, then again"
        )


def attached(part: Any) -> ModuleHook | None:
    """The hook on `part`, if there is one."""
    registry = getattr(part, "_diffusers_hook", None)
    hook: ModuleHook | None = registry.get_hook(HOOK_NAME) if registry is not None else None
    return hook


def attach(part: nn.Module, handler: CallHandler) -> None:
    """Makes `handler` receive the calls of `part` whose timesteps are in its schedule."""
    hook = attached(part)
    if hook is None:
        hook = ModuleHook()
        HookRegistry.check_if_exists_or_initialize(part).register_hook(hook, HOOK_NAME)
        hook.installed = part.forward
    hook.handlers.insert(0, handler)


def detach(part: nn.Module, handler: CallHandler) -> None:
    """Removes `handler`, and the hook on `part` with the last handler."""
    hook = attached(part)
    if hook is None or handler not in hook.handlers:
        return
    hook.handlers.remove(handler)
    if hook.handlers:
        return
    registry: Any = part._diffusers_hook
    _take_off(part, hook, registry)
    if not registry.hooks:
        del part._diffusers_hook
        if getattr(vars(part).get("forward"), "__func__", None) is type(part).forward:
            del part.forward


def _take_off(module: nn.Module, hook: Any, registry: Any) -> None:
    outer = module.forward
    registry.remove_hook(HOOK_NAME, recurse=False)
    if outer is not hook.installed:  # offloading was switched on or off since, or another hook of diffusers' was added
        module.forward = outer
        if vars(module).get("_old_forward") is hook.installed:
            module._old_forward = hook.fn_ref.original_forward


def _is_accelerate(forward: Any) -> bool:
    return isinstance(forward, functools.partial) and forward.func.__module__ == "accelerate.hooks"
