"""Notices values of tensors that Python code reads during a trace, which the graph holds as constants."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

VALUES_READ = "values_read"
"""Key in the ``meta`` of a captured graph."""

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_READS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__),
    *(Tensor.__repr__, Tensor.__dlpack__, Tensor.data_ptr),
    *(Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__, Tensor.__complex__),
}
_COPIES = {torch.tensor, torch.as_tensor, torch.asarray}
"""Functions that read values of tensors in a list."""


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
        result = func(*args, **(kwargs or {}))
        self.found |= (func in _READS or (func in _COPIES and _in_containers(args))) and not isinstance(
            result, _SYMBOLIC
        )
        return result


class _InOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, reads: ValueReads) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._reads.found |= func is torch.ops.aten._local_scalar_dense.default and not isinstance(result, _SYMBOLIC)
        return result


def _in_containers(values: Iterable[Any]) -> bool:
    """Whether any of `values` is a container with a tensor in it."""
    containers = [value for value in values if not isinstance(value, Tensor)]
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(containers))
