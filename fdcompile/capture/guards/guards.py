"""Has the UNet changed since it was captured?"""

from __future__ import annotations

import copy
import hashlib
import json
from itertools import chain
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn
from torch.utils.hooks import RemovableHandle

from fdcompile.capture.guards import process
from fdcompile.capture.guards.reach import CONSTANTS, MACHINERY, Reached, is_library, is_plain, reach

_ATTACHED = {"forward", "_diffusers_hook", "_hf_hook", "_old_forward"}
"""Attributes of a module by which others stand around it."""

STATEFUL = "its modules or attention processors keep values from one call to the next"


class Guards:
    """What a captured graph of `unet` has baked in besides the contents of tensors.

    Modules by type, parameters by identity (LoRA layers and ``load_state_dict(assign=True)`` replace them), attention
    processors, every plain number, flag and string on any of them (FreeU, LoRA and IP-Adapter scales), and whatever
    else Python code in them can reach: objects, closures, globals. Processors that hold nothing but plain values are
    told apart by their type and values, because some pipelines make new ones at each call.

    Attributes:
        epoch: a number for what is baked in, as of the last `refresh`: it grows when that has changed, and is what it
            was before where a change was undone.
        unsupported_reason: why no graph can stand in for the UNet (its parts do more than compute), or None.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.epoch = 0
        self.unsupported_reason: str | None = None
        self._baked: list[Any] = []
        self._before: tuple[int, list[Any]] = (0, [])
        self._epochs = 0
        self._stateful: str | None = None
        self._unet = unet
        self._modules: list[nn.Module] = []
        self._all = _Watch([], Reached())
        self._dials = _Watch([], Reached())
        self._tensors_reached: list[torch.Tensor] = []
        self._contents: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._attributes: list[dict[Any, Any]] = []
        self._hooks: list[dict[Any, Any]] = []
        self._sizes = 0, 0
        self._last_hook = 0
        self._registrations = process.Registrations(self)
        self._registered = 0
        self._functional: list[Any] = []
        self._tensors: list[dict[str, Any]] = []
        self._identities: list[int] = []

    def refresh(self) -> None:
        """Brings `epoch` and `unsupported_reason` up to date."""
        if self._baked and not self.touched() and self._identify() == self._identities:
            return
        self._registered, self._functional = self._registrations.count, process.values()
        self._modules = modules = list(self._unet.modules())
        own = MACHINERY | _ATTACHED
        found = reach([value for module in modules for name, value in vars(module).items() if name not in own])
        owners = [*modules, *found.objects]
        attributes = [getattr(owner, "__dict__", {}) for owner in owners]
        reasons = filter(None, (why(module) for why in (_why_managed, _why_another) for module in modules[1:]))
        self.unsupported_reason = self._stateful or (process.HOOKED if process.foreign_hooks() else next(reasons, None))
        children: list[dict[Any, Any]] = [module._modules for module in modules]
        hooks: list[dict[Any, Any]] = [
            own for module in modules for own in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._all = _Watch([*attributes, *children, *hooks], found)
        dials = [vars(module) for module in modules if _is_dial(module)]
        dials += (getattr(owner, "__dict__", {}) for owner in found.objects if not isinstance(owner, FrozenDict))
        self._dials = _Watch(dials, found)
        self._attributes = attributes[1 : len(modules)]  # the UNet's own are outside of its graph
        self._hooks = hooks[2:]
        self._sizes = sum(map(len, self._attributes)), sum(map(len, self._hooks))
        self._last_hook = RemovableHandle.next_id
        self._tensors_reached = found.tensors
        self._tensors = [own for module in modules for own in (module._parameters, module._buffers) if own]
        self._identities = self._identify()
        baked: list[Any] = [*self._identities, *(id(owner) for owner in owners if _has_identity(owner))]
        baked += map(type, owners)
        for values in attributes[: len(modules)]:
            baked += ((name, copy.deepcopy(value)) for name, value in values.items() if _is_baked(name, value))
        for values in [*attributes[len(modules) :], *(own for own in found.containers if isinstance(own, dict))]:
            baked += ((_token(name), _token(value)) for name, value in values.items())
        for container in found.containers:
            baked += map(_token, () if isinstance(container, dict) else container)
        baked += (_token(place.value()) for place in found.places)
        if baked != self._baked:
            self._before, before = (self.epoch, self._baked), self._before
            self._baked = baked
            if baked == before[1]:
                self.epoch = before[0]
            else:
                self._epochs = self.epoch = self._epochs + 1

    def prepare_capture(self) -> None:
        """Before a capture: remembers what is in the tensors that Python code reaches, which it may write to."""
        self._contents = [(tensor, tensor.clone()) for tensor in self._tensors_reached]

    def touched(self) -> bool:
        """Whether what Python code reaches is another than at `refresh`."""
        return not self._all.untouched()

    def undo_side_effects(self) -> None:
        """After a capture: puts back what it, or the UNet, has replaced or written."""
        self._all.restore()
        for tensor, content in self._contents:
            if not torch.equal(tensor, content):
                tensor.copy_(content)

    def declare_stateful(self) -> None:
        """The UNet changes something of its own at every call."""
        self.unsupported_reason = self._stateful = STATEFUL

    def changed_within_run(self) -> bool:
        """Whether a scale of an adapter or FreeU, or what else a processor reaches, is another than at `refresh`.

        Also, whether a module has got an attribute, such as a ``forward``, another part or parameter, or a hook since,
        and whether a function of torch was replaced. This runs at every step.
        """
        if not self._dials.untouched() or sum(map(len, self._attributes)) != self._sizes[0]:
            return True
        if self._registrations.count != self._registered or process.values() != self._functional:
            self._registered, self._functional = self._registrations.count, process.values()
            if list(self._unet.modules()) != self._modules or self._identify() != self._identities:
                return True
        if RemovableHandle.next_id == self._last_hook:  # no hook was registered anywhere
            return False
        self._last_hook = RemovableHandle.next_id
        return sum(map(len, self._hooks)) != self._sizes[1] or bool(process.foreign_hooks())

    def _identify(self) -> list[int]:
        """Of all parameters, of the modules' classes, of what these compute, and of what it goes through."""
        kinds: list[Any] = list(map(type, self._modules))
        tensors = chain.from_iterable(values.values() for values in self._tensors)
        forwards = (kind.forward for kind in dict.fromkeys(kinds))
        return [id(own) for own in (*tensors, *kinds, *forwards, *process.functions(), *process.foreign_hooks())]


def fingerprint(unet: nn.Module) -> str:
    """Sha256 of the types of a UNet's modules and attention processors and of the plain values on them.

    It is the same for an equal UNet in another process.
    """
    parts: list[Any] = []
    for path, module in unet.named_modules():
        for owner in filter(None, (module if path else None, vars(module).get("processor"))):
            values = {name: value for name, value in vars(owner).items() if _is_baked(name, value)}
            parts.append((path, type(owner).__qualname__, values))
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class _Watch:
    """Notices what is new or replaced in dicts, lists and sets and at places; mostly one comparison in C."""

    def __init__(self, attributes: list[dict[Any, Any]], found: Reached) -> None:
        containers = [*attributes, *found.containers]
        mutable = [
            value
            for values in containers
            if isinstance(values, dict)
            for name, value in values.items()
            if type(value) in (dict, list) and _is_baked(name, value)
        ]
        self._live = [*containers, *mutable]
        self._seen = [*map(copy.copy, containers), *map(copy.deepcopy, mutable)]
        self._places = found.places
        self._tensors = [tensor for tensor in found.tensors if not tensor.is_inference()]
        self._rest = self._read()

    def untouched(self) -> bool:
        try:
            return self._live == self._seen and self._read() == self._rest
        except (RuntimeError, ValueError):  # a tensor or array was replaced: those do not compare to one truth
            return False

    def restore(self) -> None:
        for live, seen in zip(self._live, self._seen, strict=True):
            if isinstance(live, dict):
                for name in live.keys() - seen.keys():
                    del live[name]
                live.update({name: value for name, value in seen.items() if live.get(name, live) is not value})
            else:
                live.clear()
                (live.update if isinstance(live, set) else live.extend)(seen)
        for place, value in zip(self._places, self._rest, strict=False):
            if place.value() is not value:
                place.put(value)

    def _read(self) -> list[Any]:
        """Values at places, and how often tensors were written to."""
        return [*(place.value() for place in self._places), *(tensor._version for tensor in self._tensors)]


def _token(value: Any) -> Any:
    """What tells `value` from another: itself, if it is plain."""
    return copy.deepcopy(value) if is_plain(value) else id(value)


def _why_managed(module: nn.Module) -> str | None:
    """Offloading and casting bring a part's weights into place when it is called; a forward hook may do anything."""
    if module._forward_hooks or module._forward_pre_hooks:
        return f"a {type(module).__name__} in it has a forward hook, which only the stock UNet calls"
    if getattr(getattr(module, "_hf_hook", None), "offload", False):
        return "its parts are offloaded one by one: use enable_model_cpu_offload, which moves the UNet as a whole"
    if hooks := getattr(getattr(module, "_diffusers_hook", None), "hooks", {}):
        return f"diffusers hooks manage its parts: {', '.join(hooks)}"
    return None


def _why_another(module: nn.Module) -> str | None:
    """Tiling patches and LoRA networks replace the forward of a module, or of its class."""
    name = type(module).__name__
    if "forward" in vars(module):
        return f"the forward of a {name} in it was replaced, and only the stock UNet calls another"
    owner: Any = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    written_in = getattr(owner.forward, "__globals__", {}).get("__name__", owner.__module__)
    if written_in != owner.__module__ and not is_library(written_in):
        return f"{name}.forward was replaced, and only the stock UNet calls another"
    return None


class _Plain:
    """Keeps all it has in its ``__dict__``."""


def _has_identity(owner: Any) -> bool:
    """Whether more is in `owner` than plain values: of functions, partials and slots the attributes do not tell."""
    kind = type(owner)
    hidden = kind.__basicsize__ != _Plain.__basicsize__ or any("__slots__" in vars(base) for base in kind.__mro__)
    return isinstance(owner, nn.Module) or hidden or not all(map(is_plain, getattr(owner, "__dict__", {}).values()))


def _is_dial(module: nn.Module) -> bool:
    """LoRA, IP-Adapter's and GLIGEN layers, and the blocks that FreeU marks."""
    values = vars(module)
    adapter = "scaling" in values or "enabled" in values or isinstance(values.get("scale"), list)
    return adapter or hasattr(module, "resnets")


def _is_baked(name: str, value: Any) -> bool:
    return type(value) in CONSTANTS or (name not in MACHINERY and is_plain(value))
