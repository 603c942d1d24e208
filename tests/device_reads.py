"""Counts what would make the CPU wait for a GPU, and the operations that it would launch; on any device.

Run what is measured once before: a capture under these modes would be traced by them.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fdcompile

aten = torch.ops.aten

_READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
}
"""Operations whose result, or its size, the CPU waits for; ``item``, ``bool`` and ``int`` end in the first."""

_COPIES = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu"}
"""Copies to the CPU that dispatch nothing where a tensor is there already."""

_PACKAGE = str(Path(fdcompile.__file__).parent)
_LIBRARY = str(Path(torch.__file__).parent)


class DeviceRead(NamedTuple):
    """A value that the CPU waits for, or that it makes on the device out of Python numbers, which waits as well.

    Attributes:
        operation: such as ``aten.equal.default``, ``tolist`` or ``tensor``.
        shape: of the tensor.
        place: ``file:line function`` of the innermost frame outside torch.
        fdcompile: whether that frame is fdcompile's.
    """

    operation: str
    shape: tuple[int, ...]
    place: str
    fdcompile: bool


@dataclass
class Counted:
    """What was counted so far: device reads in their order, and operations by name, views included."""

    reads: list[DeviceRead] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)

    @property
    def own_reads(self) -> list[DeviceRead]:
        """Those that fdcompile itself makes: not the stock pipeline's or its scheduler's."""
        return [read for read in self.reads if read.fdcompile]


@contextlib.contextmanager
def count_device_reads() -> Iterator[Counted]:
    """Counts device reads and operations of this thread."""
    counted = Counted()
    with _Functions(counted), _Operations(counted):
        yield counted


class _Functions(TorchFunctionMode):
    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self._counted = counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _COPIES:
            self._counted.reads.append(_read(_COPIES[func], args[0]))
        elif func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            self._counted.reads.append(_read(func.__name__, result))
        return result


class _Operations(TorchDispatchMode):
    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self._counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._counted.operations[str(func)] += 1
        to_cpu = func is aten._to_copy.default and args[0].device.type != "cpu" and _is_cpu(kwargs.get("device"))
        from_device = func is aten.copy_.default and args[0].device.type == "cpu" != args[1].device.type
        if func in _READS or to_cpu or from_device or _has_mask(func, args):
            self._counted.reads.append(_read(str(func), args[1] if from_device else args[0]))
        return func(*args, **kwargs)


def _is_cpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _has_mask(func: Any, args: Any) -> bool:
    """Whether `func` indexes by a mask, which must be counted first."""
    if func.overloadpacket not in (aten.index, aten.index_put, aten.index_put_):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _read(operation: str, tensor: Tensor) -> DeviceRead:
    frame: Any = sys._getframe(2)
    while frame.f_code.co_filename.startswith(_LIBRARY) or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    code = frame.f_code
    place = f"{code.co_filename}:{frame.f_lineno} {code.co_name}"
    return DeviceRead(operation, tuple(tensor.shape), place, code.co_filename.startswith(_PACKAGE))
