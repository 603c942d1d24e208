"""Torch modules outside of a UNet that its Python code can reach, such as one that an attention processor holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class OutsideModules:
    """Guards the weights of `modules` by identity, layout and address, and their code by identity.

    A graph holds the memory of these weights, and does not follow an assignment to ``.data`` as it does for the UNet's.
    Modules that accelerate moves between devices get other memory and another forward at each run: these are skipped.

    Attributes:
        weights: parameters and buffers.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        moved = {id(part) for module in modules if hasattr(module, "_hf_hook") for part in module.modules()}
        still = [module for module in modules if id(module) not in moved]
        self.weights = [weight for module in modules for weight in weights_of(module) if weight is not None]
        self._still = [weight for module in still for weight in weights_of(module) if weight is not None]
        self._code = [vars(module).get("forward") for module in still]
        for module in modules:
            self._code += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        self._addresses = [*map(_address, self._still)]

    def untouched(self) -> bool:
        return self._addresses == [*map(_address, self._still)]

    def facts(self) -> list[Any]:
        """Comparable values, see `Snapshot`."""
        return [*map(id, self.weights), *map(id, self._code), *self._addresses]

    def readable(self) -> list[torch.Tensor]:
        """Weights whose content can be read."""
        return [*filter(has_content, self.weights)]


def weights_of(module: nn.Module) -> list[Any]:
    """Parameters and buffers of `module` itself; None for a name without one."""
    return [*module._parameters.values(), *module._buffers.values()]


def layout(weight: torch.Tensor) -> tuple[Any, ...]:
    return weight.dtype, weight.device, weight.shape, weight.stride() if weight.layout is torch.strided else ()


def _address(weight: torch.Tensor) -> Any:
    return (*layout(weight), weight.data_ptr()) if has_content(weight) else None


def has_content(weight: torch.Tensor) -> bool:
    """Whether `weight` is a dense tensor in memory, of no other class."""
    is_plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.layout is torch.strided
    return is_plain and not (weight.is_meta or weight.is_nested or weight.is_conj() or weight.is_neg())
