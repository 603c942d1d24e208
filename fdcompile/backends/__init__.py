"""Backends, one per file: a `Backend` lowers stages to callables, a `PackageFormat` writes them to files."""

from __future__ import annotations

import importlib

import torch

from fdcompile.backends.eager import EagerBackend
from fdcompile.backends.protocols import Backend, PackageFormat

BACKENDS = ("auto", "eager", "inductor")

FORMATS = ("aot_inductor", "onnx", "tensorrt", "tensorrt_onnx", "tensorrt_rtx", "tensorrt_rtx_refit")


def check_backend(backend: object) -> None:
    """Checks that `backend` is a known name or a backend object.

    Raises:
        ValueError: the name is unknown.
        TypeError: `backend` is neither a name nor a `Backend`.
    """
    if isinstance(backend, str):
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}, or a backend object")
    elif not isinstance(backend, Backend) or isinstance(backend, type):
        raise TypeError(
            f"backend={backend!r}: expected a name, or an object with a `name` and `lower(graph_module, name)`"
        )


def resolve_backend(backend: str | Backend, device: torch.device) -> Backend:
    """Returns the backend for `device`: ``"auto"`` is inductor on CUDA and eager elsewhere."""
    if not isinstance(backend, str):
        return backend
    if backend == "auto":
        backend = "inductor" if device.type == "cuda" else "eager"
    if backend == "eager":
        return EagerBackend()
    from fdcompile.backends.inductor import InductorBackend  # torch's compiler takes a second to import

    return InductorBackend()


def package_format(name: str) -> PackageFormat:
    """Returns the package format called `name`.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in FORMATS:
        raise ValueError(f"format={name!r}: expected one of {', '.join(FORMATS)}")
    module = importlib.import_module(f"fdcompile.backends.{name}")
    chosen: PackageFormat = module.FORMAT
    return chosen
