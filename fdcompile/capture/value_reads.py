"""Notices values of tensors that Python code reads during a trace, which the graph holds as constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

VALUES_READ = "values_read"
"""Key in the ``meta`` of a captured graph."""

_READS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__),
    *(Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__, Tensor.__complex__),
}


class ValueReads(TorchFunctionMode):
    """Notices reads within its block.

    Attributes:
        found: whether a value was read that does not depend on the inputs of the trace.
    """

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found |= func in _READS and not isinstance(result, torch.SymInt | torch.SymFloat | torch.SymBool)
        return result
