"""Backends: stage -> callable. One file a backend; each implements `Backend`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, fx

Lowered = Callable[..., tuple[Tensor, ...]]
"""A lowered stage: takes the stage's inputs in order, returns its outputs in order."""


@runtime_checkable
class Backend(Protocol):
    """Turns a stage's graph into something that runs."""

    name: str

    def lower(self, graph_module: fx.GraphModule, name: str) -> Lowered:
        """Lowers `graph_module`, the stage called `name`. It may compile now or at the first call."""


BACKENDS = ("auto", "eager", "inductor")


def check_backend(backend: object) -> None:
    """Refuses what is neither a known name nor a backend object.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a `Backend`.
    """
    if isinstance(backend, str):
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}, or a backend object")
    elif not isinstance(backend, Backend) or isinstance(backend, type):
        raise TypeError(
            f"backend={backend!r}: expected a name, or an object with a `name` and `lower(graph_module, name)`"
        )


def resolve_backend(backend: str | Backend, device: torch.device) -> Backend:
    """The backend to use on `device`: ``"auto"`` is inductor on CUDA and eager elsewhere."""
    from fdcompile.backends.eager import EagerBackend
    from fdcompile.backends.inductor import InductorBackend

    if not isinstance(backend, str):
        return backend
    if backend == "auto":
        backend = "inductor" if device.type == "cuda" else "eager"
    return InductorBackend() if backend == "inductor" else EagerBackend()
