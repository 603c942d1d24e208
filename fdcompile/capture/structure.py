"""Has the UNet changed since it was captured?"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import nn

_CONSTANTS = {type(None), bool, int, float, str}
_CONTAINERS = {dict, list, tuple}
_MACHINERY = vars(nn.Module()).keys()


class Structure:
    """What a captured graph of `unet` has baked in besides the contents of tensors.

    Modules by type, parameters by identity (LoRA layers and ``load_state_dict(assign=True)`` replace them), attention
    processors, and every plain number, flag and string on any of them (FreeU, LoRA and IP-Adapter scales). Processors
    that hold nothing else are told apart by their type and values, because some pipelines make new ones at each call.

    Attributes:
        baked: all of it, as of the last `refresh`.
        managed: why a graph cannot stand in for it, or None if one can: its parts do more than compute.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.baked: list[Any] = []
        self.managed: str | None = None
        self._stateful: str | None = None
        self._unet = unet
        self._all = _Watch([])
        self._dials = _Watch([])
        self._parameters: list[dict[str, Any]] = []
        self._identities: list[int] = []

    def refresh(self) -> None:
        """Brings `baked` up to date."""
        if self.baked and self._all.untouched() and list(_identities(self._parameters)) == self._identities:
            return
        modules = list(self._unet.modules())
        owners = [*modules, *(processor for module in modules if (processor := vars(module).get("processor")))]
        attributes = [getattr(owner, "__dict__", {}) for owner in owners]
        self.managed = self._stateful or next(filter(None, map(_why_managed, modules[1:])), None)
        hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._all = _Watch([*attributes, *(module._modules for module in modules), *hooks])
        self._dials = _Watch([vars(owner) for owner in owners if _is_dial(owner)])
        self._parameters = [module._parameters for module in modules if module._parameters]
        self._identities = list(_identities(self._parameters))
        baked: list[Any] = [*self._identities, *(id(owner) for owner in owners if _has_identity(owner))]
        for owner, values in zip(owners, attributes, strict=True):
            baked.append(type(owner))
            baked += ((name, copy.deepcopy(value)) for name, value in values.items() if _is_baked(name, value))
        self.baked = baked

    def undo_side_effects(self) -> bool:
        """After a capture: puts attributes back that it, or the UNet, has replaced. Whether the UNet did."""
        untouched = self._all.untouched()
        self._all.restore()
        return not untouched

    def declare_stateful(self) -> None:
        """The UNet changes its own attributes at every call."""
        self.managed = self._stateful = "its modules or attention processors keep values from one call to the next"

    def dials_turned(self) -> bool:
        """Whether a scale of an adapter or FreeU was changed since the last `refresh`: what callbacks do in a run."""
        return not self._dials.untouched()


def fingerprint(unet: nn.Module) -> str:
    """Sha256 of the types of a UNet's modules and attention processors and of the plain values on them.

    Unlike `Structure.baked` it is the same for an equal UNet in another process.
    """
    parts: list[Any] = []
    for path, module in unet.named_modules():
        for owner in filter(None, (module if path else None, vars(module).get("processor"))):
            values = {name: value for name, value in vars(owner).items() if _is_baked(name, value)}
            parts.append((path, type(owner).__qualname__, values))
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class _Watch:
    """Notices new attributes and writes to plain lists and dicts; one comparison in C, since it runs at every step."""

    def __init__(self, attributes: list[dict[Any, Any]]) -> None:
        mutable = [
            value
            for values in attributes
            for name, value in values.items()
            if type(value) in (dict, list) and _is_baked(name, value)
        ]
        self._live = [*attributes, *mutable]
        self._seen = [*map(copy.copy, attributes), *map(copy.deepcopy, mutable)]

    def untouched(self) -> bool:
        try:
            return self._live == self._seen
        except (RuntimeError, ValueError):  # a tensor or array was replaced: those do not compare to one truth
            return False

    def restore(self) -> None:
        for live, seen in zip(self._live, self._seen, strict=True):
            if isinstance(live, list):
                live[:] = seen
                continue
            for name in live.keys() - seen.keys():
                del live[name]
            live.update({name: value for name, value in seen.items() if live.get(name, live) is not value})


def _why_managed(module: nn.Module) -> str | None:
    """Offloading and casting bring a part's weights into place when it is called; a forward hook may do anything."""
    if module._forward_hooks or module._forward_pre_hooks:
        return f"a {type(module).__name__} in it has a forward hook, which only the stock UNet calls"
    if getattr(getattr(module, "_hf_hook", None), "offload", False):
        return "its parts are offloaded one by one: use enable_model_cpu_offload, which moves the UNet as a whole"
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return f"diffusers hooks manage its parts: {', '.join(hooks)}" if hooks else None


def _identities(parameters: list[dict[str, Any]]) -> Iterator[int]:
    return map(id, chain.from_iterable(values.values() for values in parameters))


class _Plain:
    """Keeps all it has in its ``__dict__``."""


def _has_identity(owner: Any) -> bool:
    """Whether more is in `owner` than plain values: of functions, partials and slots the attributes do not tell."""
    kind = type(owner)
    hidden = kind.__basicsize__ != _Plain.__basicsize__ or any("__slots__" in vars(base) for base in kind.__mro__)
    return isinstance(owner, nn.Module) or hidden or not all(map(_is_plain, getattr(owner, "__dict__", {}).values()))


def _is_dial(owner: Any) -> bool:
    """Attention processors, among them IP-Adapter's, LoRA and GLIGEN layers, and the blocks that FreeU marks."""
    values = getattr(owner, "__dict__", {})
    adapter = "scaling" in values or "enabled" in values or isinstance(values.get("scale"), list)
    return bool(values) and (adapter or not isinstance(owner, nn.Module) or hasattr(owner, "resnets"))


def _is_baked(name: str, value: Any) -> bool:
    return type(value) in _CONSTANTS or (name not in _MACHINERY and _is_plain(value))


def _is_plain(value: Any) -> bool:
    if type(value) not in _CONTAINERS:
        return type(value) in _CONSTANTS
    entries = value.values() if isinstance(value, dict) else value
    return _CONSTANTS.issuperset(map(type, entries)) or all(map(_is_plain, entries))
