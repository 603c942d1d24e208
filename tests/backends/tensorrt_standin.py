"""A stand-in for the `tensorrt` module, with which torch-tensorrt lowers graphs on a machine that has no GPU.

Any attribute is a class that answers any attribute and call. Nothing is built: converters are looked up, not run.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, made := _Anything(name, (_Instance,), {}))
        return made

    def __int__(cls) -> int:
        return 0

    def __rlshift__(cls, other: int) -> int:
        return other


class _Instance(metaclass=_Anything):
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return getattr(type(self), name)

    def __call__(self, *args: Any, **kwargs: Any) -> _Instance:
        return self


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "tensorrt_rtx":
            raise AttributeError(name)
        setattr(self, name, made := _Anything(name, (_Instance,), {}))
        return made


def install() -> None:
    """Makes ``import tensorrt`` give the stand-in, and ``import torch_tensorrt`` work without a driver."""
    module = _Module("tensorrt")
    module.__version__, module.__path__, module.__file__, module.tensorrt = "11.0.0", [], __file__, module
    module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    sys.modules["tensorrt"] = module
    torch._C.__dict__.setdefault("_CudaDeviceProperties", type("_CudaDeviceProperties", (), {}))
    is_file = os.path.isfile
    with _gpu(), mock.patch("os.path.isfile", lambda path: "libtorchtrt" not in str(path) and is_file(path)):
        import torch_tensorrt.dynamo  # noqa: F401


@contextlib.contextmanager
def lowering() -> Iterator[list[Any]]:
    """Lets `torch_tensorrt.dynamo.compile` lower on the CPU; the list receives what each dry run has counted."""
    from torch_tensorrt.dynamo import _compiler
    from torch_tensorrt.dynamo.lowering import _decompositions

    counted: list[Any] = []
    cpu = torch.device("cpu")
    with (
        _gpu(),
        mock.patch.object(_compiler, "to_torch_device", lambda device: cpu),
        mock.patch.object(_decompositions, "to_torch_device", lambda device: cpu),
        mock.patch.object(_compiler, "dryrun_stats_display", lambda tracker, dryrun: counted.append(tracker)),
    ):
        yield counted


@contextlib.contextmanager
def _gpu() -> Iterator[None]:
    with (
        mock.patch("torch.cuda.get_device_capability", lambda *device: (9, 0)),
        mock.patch("torch.cuda.current_device", lambda: 0),
    ):
        yield
