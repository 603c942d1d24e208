"""Detects changes of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have equal types, devices and values. Synchronizes with the device."""
    same_type = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return same_type and torch.equal(one, other)


class TensorGuard:
    """Detects writes to a tensor, and its replacement within the same Python object.

    The version counter shows writes, except those through ``.data`` or numpy and those in inference mode. The address
    shows that ``.data`` was assigned, or that ``torch.utils.swap_tensors`` exchanged the tensor. Other writes are found
    by comparison with a copy of the content: always on a CPU, where this does not synchronize, and only for inference
    tensors on an accelerator.

    Attributes:
        tensor: the tensor that is guarded.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._alias = tensor.detach()  # keeps the memory, so that no other tensor gets its address
        self._layout = _layout(tensor)
        self._version = _version(tensor)
        self._bits = _bits(self._alias)
        self._content = self._bits.clone() if self.compares_content(tensor) else None

    @staticmethod
    def compares_content(tensor: Tensor) -> bool:
        """Whether writes to `tensor` are detected by its content."""
        return tensor.device.type == "cpu" or tensor.is_inference()

    def untouched(self) -> bool:
        """Whether the tensor is unchanged since the guard was made."""
        if _version(self.tensor) != self._version or _layout(self.tensor) != self._layout:
            return False
        return self._content is None or torch.equal(self._bits, self._content)

    def equals(self, other: Tensor) -> bool:
        """Whether `other` has the type and the values of the tensor, which must be untouched.

        Synchronizes with the device unless `other` is a view of the same memory, such as a new view of the same slice.
        """
        same_memory = other.device == self._alias.device and _layout(other) == self._layout
        return same_memory or equal(self._alias, other)


def _version(tensor: Tensor) -> int | None:
    """Version counter; None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version


def _bits(tensor: Tensor) -> Tensor:
    """A view of `tensor` as 64-bit numbers, which compare faster; `tensor` itself if its layout does not allow that."""
    try:
        return tensor.view(torch.int64)
    except RuntimeError:
        return tensor


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
