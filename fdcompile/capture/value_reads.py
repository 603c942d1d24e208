"""Notices values of tensors that Python code reads during a trace, which the graph holds as constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

VALUES_READ = "values_read"
"""Key in the ``meta`` of a captured graph."""

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_READS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__),
    *(Tensor.__repr__, Tensor.__dlpack__, Tensor.data_ptr, Tensor.untyped_storage),
    *(Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__, Tensor.__complex__),
}
_REAL = (Tensor, torch.nn.Parameter)
_COPIES = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
"""Functions that read values of tensors in a sequence."""

_READING_OPERATORS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.repeat_interleave.Tensor}


class ValueReads(TorchFunctionMode):
    """Notices functions that return values, within its block.

    Attributes:
        found: whether a value was read that does not depend on the inputs of the trace.
        in_operators: a mode for the UNet's forward, which also notices where an operator takes a tensor for a number,
            such as ``torch.full((1,), tensor)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = False
        self.in_operators = _InOperators(self)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        reads = func in _READS or (func in _COPIES and any(map(_holds_tensor, (*args, *kwargs.values()))))
        if func is Tensor.__repr__:
            reads = type(args[0]) in _REAL  # others are traced
        self.found |= reads and not isinstance(result, _SYMBOLIC)
        return result


class _InOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, reads: ValueReads) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _READING_OPERATORS:
            sizes = result.shape if isinstance(result, Tensor) else [result]
            self._reads.found |= not any(isinstance(size, _SYMBOLIC) for size in sizes)
        return result


def _holds_tensor(value: Any) -> bool:
    """Whether `value` is a sequence with a tensor in it."""
    if isinstance(value, Tensor | str) or not isinstance(value, Sequence):
        return False
    return any(isinstance(entry, Tensor) or _holds_tensor(entry) for entry in value)
