"""A snapshot of everything in a UNet that a captured graph is specialized to."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn
from torch._C._dynamo.guards import dict_version
from torch.utils.hooks import RemovableHandle

from fdcompile.capture.guards.checksum import checksum_of
from fdcompile.capture.guards.outside import OutsideModules, has_content, layout, weights_of
from fdcompile.capture.guards.places import Namespace
from fdcompile.capture.guards.reach import CONSTANTS, MACHINERY, Reached, is_plain, reach
from fdcompile.capture.guards.support import foreign_hooks, modes, why_unsupported
from fdcompile.capture.guards.watch import Watch


class Snapshot:
    """State of `unet` that a graph is specialized to.

    Modules by type, parameters by identity, type and strides (LoRA layers and ``load_state_dict(assign=True)`` replace
    them), attention processors, all plain numbers, flags and strings on any of these (FreeU, LoRA and IP-Adapter
    scales), everything else that their Python code can reach (objects, closures, globals, arrays, modules outside of
    the UNet), and the code itself: methods of classes, and library functions by the places where they are looked up.
    Processors with only plain values are compared by type and values, because some pipelines make new ones per call.

    Attributes:
        facts: comparable values of the state; graphs can be shared between equal ones.
        unsupported_reason: reason why no graph can replace the UNet, or None.
        tensors: tensors that Python code reaches, other than those of the UNet's modules.
        state: state that Python code reaches and may write to.
        kept: objects whose identities are in `facts`, other than weights.

    Args:
        unet: the UNet.
        values_read: whether Python code reads values of tensors, so that `facts` include the contents of `tensors`.
    """

    def __init__(self, unet: nn.Module, values_read: bool = False) -> None:
        reached = reach([unet])
        inside = dict.fromkeys(map(id, unet.modules()))
        modules = [*unet.modules(), *(module for module in reached.modules if id(module) not in inside)]
        self.unsupported_reason = why_unsupported(modules[1 : len(inside)], reached.opaque)
        self.tensors = reached.tensors
        self._outside = OutsideModules(modules[len(inside) :])
        tensors = [*reached.tensors, *(self._outside.readable() if values_read else ())]
        if values_read:
            reached.arrays += (_bytes(tensor) for tensor in reached.tensors if _is_readable(tensor))

        attributes = [vars(module) for module in modules]
        members = [named for module in modules for named in (module._parameters, module._buffers)]
        parts = [module._modules for module in modules]
        hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._objects = [owner for owner in reached.objects if hasattr(owner, "__dict__")]
        objects = [vars(owner) for owner in self._objects if not isinstance(owner, FrozenDict)]
        frozen = [vars(owner) for owner in self._objects if isinstance(owner, FrozenDict)]
        named = [place for place in (*reached.places, *reached.code) if place.namespace is not None]
        unnamed = [place for place in reached.places if place.namespace is None]
        namespaces = [*reached.namespaces.values(), *(Namespace(place.owner, None) for place in named)]
        names = {id(each.owner): each.names for each in [Namespace(torch.Tensor, None), *namespaces]}

        self.state = Watch(
            [*attributes, *parts, *hooks, *objects, *frozen, *reached.containers, torch.Tensor.__dict__],
            [*named, *unnamed],
            tensors,
            reached.arrays,
            reached.namespaces.values(),
        )
        self._within_run = Watch(
            [*objects, *reached.containers], unnamed, tensors, reached.arrays, dicts=[*parts, *members]
        )
        self._between_runs = Watch([*frozen, *parts, *hooks])
        self._owners = [*modules, *reached.objects]
        self._identities = self._read_identities()
        self._versioned = [*attributes, *names.values()]
        self._versions = self._read_versions()
        self._modes, self._foreign_hooks = modes(), foreign_hooks()
        self._hooks = hooks[2:]  # without the UNet's own, which are outside of its graph
        self._number_of_hooks = sum(map(len, self._hooks))
        self._last_hook = RemovableHandle.next_id
        self._weights = [weight for module in unet.modules() for weight in weights_of(module)]
        self._layouts = _layouts(self._weights)
        self.facts = self._facts(reached, modules)
        if values_read:
            self.facts.append(checksum_of(tensors))
        self.kept = reached, self.state, self._foreign_hooks, self._outside

    def untouched(self) -> bool:
        """Whether nothing has changed."""
        return (
            self.untouched_within_run()
            and self._between_runs.untouched()
            and self._layouts == _layouts(self._weights)
            and self._outside.untouched()
            and self._foreign_hooks == foreign_hooks()
        )

    def untouched_within_run(self) -> bool:
        """Whether nothing has changed that callbacks may change. Runs at every step.

        These are all but layouts of weights. Attributes of modules and classes, and globals, are compared if any was
        written to.
        """
        if not self._within_run.untouched() or self._modes != modes() or self._identities != self._read_identities():
            return False
        versions = self._read_versions()
        if versions != self._versions:
            if not self.state.untouched():
                return False
            self._versions = versions
        if RemovableHandle.next_id == self._last_hook:  # no hook was registered anywhere
            return True
        self._last_hook = RemovableHandle.next_id
        return sum(map(len, self._hooks)) == self._number_of_hooks and foreign_hooks() == self._foreign_hooks

    def _read_identities(self) -> list[Any]:
        """Types of all owners of attributes, and identities of their ``__dict__``, which may be replaced."""
        return [*map(type, self._owners), *map(id, map(vars, self._objects))]

    def _read_versions(self) -> list[int]:
        """Versions of attributes and global names, which every write increases. Dynamo's guards use them, too."""
        return [*map(dict_version, self._versioned)]

    def _facts(self, reached: Reached, modules: list[nn.Module]) -> list[Any]:
        facts: list[Any] = [*map(type, self._owners), *(id(owner) for owner in self._owners if _has_identity(owner))]
        facts += [*map(id, self._weights), *_relative(self._layouts), *self._outside.facts()]
        for module in modules:
            facts += ((name, copy.deepcopy(value)) for name, value in vars(module).items() if is_baked(name, value))
        dicts = [getattr(owner, "__dict__", {}) for owner in reached.objects]
        dicts += [container for container in reached.containers if isinstance(container, Mapping)]
        for values in dicts:
            facts += ((_token(name), _token(value)) for name, value in values.items())
        for container in reached.containers:
            facts += map(_token, () if isinstance(container, Mapping) else container)
        facts += ((place.name, _token(place.value())) for place in (*reached.places, *reached.code))
        facts += ((name, id(value)) for name, value in vars(torch.Tensor).items() if callable(value))
        facts += ((array.dtype, array.tobytes()) for array in map(np.asarray, reached.arrays))
        return [*facts, *map(id, foreign_hooks())]


def _is_readable(tensor: torch.Tensor) -> bool:
    """Whether `_bytes` can read `tensor`. Of other tensors only the version counter shows writes."""
    return has_content(tensor) and tensor.device.type == "cpu" and tensor.is_contiguous()


def _bytes(tensor: torch.Tensor) -> Any:
    """The memory of `tensor`."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def is_baked(name: str, value: Any) -> bool:
    """Whether an attribute of a module is a plain value that its forward may read."""
    return type(value) in CONSTANTS or (name not in MACHINERY and is_plain(value))


def _layouts(weights: list[Any]) -> list[Any]:
    """Properties that compiled code assumes of each weight; None for a name without a weight."""
    return [None if weight is None else layout(weight) for weight in weights]


def _relative(layouts: list[Any]) -> list[Any]:
    """`layouts` without the type and device of the first weight, which are part of the signature of a call."""
    usual = next((layout[:2] for layout in layouts if layout is not None), None)
    return [layout[2:] if layout is not None and layout[:2] == usual else layout for layout in layouts]


def _token(value: Any) -> Any:
    """A token to compare `value` by: a plain value itself, else its identity."""
    return copy.deepcopy(value) if is_plain(value) else id(value)


class _Plain:
    """An object whose only state is its ``__dict__``."""


def _has_identity(owner: Any) -> bool:
    """Whether `owner` is compared by identity: functions, partials and slots have state outside of their attributes."""
    kind = type(owner)
    hidden = kind.__basicsize__ != _Plain.__basicsize__ or any("__slots__" in vars(base) for base in kind.__mro__)
    return isinstance(owner, nn.Module) or hidden or not all(map(is_plain, getattr(owner, "__dict__", {}).values()))
