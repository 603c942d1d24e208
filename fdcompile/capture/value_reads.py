"""Notices values of tensors that Python code reads during a trace, which the graph holds as constants."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

_READS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__),
    *(Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__, Tensor.__complex__),
}


class ValueReads(TorchFunctionMode):
    """Notices reads within its block.

    Attributes:
        found: whether a value was read of a tensor that is no input of the trace.
    """

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= func in _READS and not isinstance(args[0], FakeTensor)
        return func(*args, **(kwargs or {}))
