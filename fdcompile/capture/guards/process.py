"""What the whole process shares and the forward of any module goes through: others may change it at any time."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.nn import functional
from torch.nn.modules import module as modules

from fdcompile.capture.guards.reach import is_library

HOOKED = "a hook on all modules is registered, which only the stock UNet calls"

_REGISTRIES = (
    modules.register_module_module_registration_hook,
    modules.register_module_parameter_registration_hook,
    modules.register_module_buffer_registration_hook,
)


def functions() -> list[Any]:
    """Those of ``torch.nn.functional``, in whose place some put their own."""
    return [own for name, own in vars(functional).items() if callable(own) and not name.startswith("_")]


def values() -> list[Any]:
    """All that is in ``torch.nn.functional``: sooner had than `functions`, and another as soon as these are."""
    return list(vars(functional).values())


def foreign_hooks() -> list[Any]:
    """Forward hooks on all modules. Torch's own, such as those that count FLOPs, only look."""
    hooks = (*modules._global_forward_hooks.values(), *modules._global_forward_pre_hooks.values())
    return [hook for hook in hooks if not is_library(getattr(hook, "__module__", None) or "")]


class Registrations:
    """Counts, as long as `owner` lives, whenever any module anywhere is given a part, a parameter or a buffer."""

    def __init__(self, owner: object) -> None:
        self.count = 0
        handles = [register(self._seen) for register in _REGISTRIES]
        for handle in handles:
            weakref.finalize(owner, handle.remove)

    def _seen(self, module: nn.Module, name: str, value: Any) -> None:
        self.count += 1
