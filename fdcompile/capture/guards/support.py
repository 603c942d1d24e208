"""Reasons why no graph can replace a UNet, such as hooks and replaced forwards with side effects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fdcompile.capture.guards.places import is_library

STATEFUL = "its modules or attention processors keep values from one call to the next"
_HOOKED = "a hook on all modules is registered, which only the stock UNet calls"
_OBSERVERS = (
    *("torch.utils._device", "torch.utils.flop_counter", "torch.utils._debug_mode", "torch.distributed"),
    "fdcompile.measure",
)
"""Modules of modes that only count or log operations, or set the device of new tensors."""


def foreign_hooks() -> list[Any]:
    """Global forward hooks, except torch's own, such as those that count FLOPs, which change nothing."""
    hooks = (*modules._global_forward_hooks.values(), *modules._global_forward_pre_hooks.values())
    return [hook for hook in hooks if not is_library(getattr(hook, "__module__", None) or "")]


def modes() -> list[Any]:
    """Active torch function modes, dispatch modes and function transforms. Called at every step."""
    active: list[Any] = []
    if torch._C._len_torch_function_stack():
        active += _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    if torch._C._len_torch_dispatch_stack():
        active += _get_current_dispatch_mode_stack()
    if (transform := torch._C._functorch.peek_interpreter_stack()) is not None:
        active.append(transform)
    return active


def why_unsupported(parts: Iterable[nn.Module], opaque: Sequence[Any]) -> str | None:
    """The first reason, in the process, in one of the UNet's `parts` or in `opaque` state; None if there is none."""
    if foreign_hooks():
        return _HOOKED
    for mode in modes():
        kind = type(mode)
        if not kind.__module__.startswith(_OBSERVERS):
            return f"a {kind.__name__} is active, which may change operations, and only the stock UNet goes through it"
    if opaque:
        return f"its Python code reads a {type(opaque[0]).__name__}, whose state cannot be compared between calls"
    parts = list(parts)
    reasons = (why(part) for why in (_why_managed, _why_borrowed, _why_another) for part in parts)
    return next(filter(None, reasons), None)


def _why_managed(part: nn.Module) -> str | None:
    """Reason for a part with forward hooks, or whose weights are offloaded or cast when it is called."""
    if part._forward_hooks or part._forward_pre_hooks:
        return f"a {type(part).__name__} in it has a forward hook, which only the stock UNet calls"
    if getattr(getattr(part, "_hf_hook", None), "offload", False):
        return "its parts are offloaded one by one: use enable_model_cpu_offload, which moves the UNet as a whole"
    if hooks := getattr(getattr(part, "_diffusers_hook", None), "hooks", {}):
        return f"diffusers hooks manage its parts: {', '.join(hooks)}"
    return None


def _why_borrowed(part: nn.Module) -> str | None:
    """Reason for a part whose parameters are replaced, as ``torch.func.functional_call`` does for one call."""
    if all(value is None or isinstance(value, nn.Parameter) for value in part._parameters.values()):
        return None
    return (
        f"a {type(part).__name__} in it has plain tensors as parameters, as torch.func.functional_call sets them: "
        f"load them into it (load_state_dict)"
    )


def _why_another(part: nn.Module) -> str | None:
    """Reason for a part whose forward is replaced, as by tiling patches and LoRA networks, on the part or its class."""
    name = type(part).__name__
    if "forward" in vars(part):
        return f"the forward of a {name} in it was replaced, and only the stock UNet calls the new one"
    owner: Any = next(kind for kind in type(part).__mro__ if "forward" in vars(kind))
    written_in = getattr(owner.forward, "__globals__", {}).get("__name__", owner.__module__)
    if written_in != owner.__module__ and not is_library(written_in):
        return f"{name}.forward was replaced, and only the stock UNet calls the new one"
    return None
