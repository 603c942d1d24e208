"""Is a tensor still what it was?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree in type, place and every value. Waits for the device."""
    same_type = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return same_type and torch.equal(one, other)


class TensorGuard:
    """Notices when a tensor is written to, or becomes another one in the same Python object.

    The version counter tells of writes, except those through ``.data`` or numpy and those in inference mode. The
    address tells that ``.data`` was assigned to, or that ``torch.utils.swap_tensors`` exchanged the tensor. A copy of
    the content tells of the rest. It is compared on a CPU, where that waits for nothing; on an accelerator only for
    inference tensors.

    Attributes:
        tensor: the tensor that is guarded.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._alias = tensor.detach()  # holds the memory, so that no other tensor gets its address
        self._layout = _layout(tensor)
        self._version = _version(tensor)
        self._content = self._alias.clone() if self.compares_content(tensor) else None

    @staticmethod
    def compares_content(tensor: Tensor) -> bool:
        """Whether the content of `tensor` tells that it was written to, and not its version counter."""
        return tensor.device.type == "cpu" or tensor.is_inference()

    def untouched(self) -> bool:
        """Whether the tensor is what it was when this was made."""
        if _version(self.tensor) != self._version or _layout(self.tensor) != self._layout:
            return False
        return self._content is None or torch.equal(self.tensor, self._content)

    def equals(self, other: Tensor) -> bool:
        """Whether `other` has the type and the values of the tensor, which is untouched.

        It waits for the device unless `other` is a view of the same memory, such as the same slice taken anew.
        """
        same_memory = other.device == self._alias.device and _layout(other) == self._layout
        return same_memory or equal(self._alias, other)


def _version(tensor: Tensor) -> int | None:
    """None: it does not count its writes."""
    return None if tensor.is_inference() else tensor._version


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
