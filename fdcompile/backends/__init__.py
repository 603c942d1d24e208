"""Backends: stage -> callable. One file a backend; each implements `Backend`, or `PackageFormat` if it uses files."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from fdcompile.package.export import StageExport
    from fdcompile.package.manifest import PackagedStage

Lowered = Callable[..., tuple[Tensor, ...]]
"""A lowered stage: takes the stage's inputs in order, returns its outputs in order."""


@runtime_checkable
class Backend(Protocol):
    """Turns a stage's graph into something that runs."""

    name: str

    def lower(self, graph_module: fx.GraphModule, name: str) -> Lowered:
        """Lowers `graph_module`, the stage called `name`. It may compile now or at the first call."""


WeightSource = Literal["live", "copied", "held"]
"""Whose weights a package's callables run on: ``"live"``, the UNet's; ``"held"``, those in the files; ``"copied"``,
those in the files or, where they differ, the UNet's, put in their place."""

CONSTANTS = "constants.safetensors"
"""File of a package with the tensors that its stages read and no module of the UNet owns."""


def check_installed(what: str, extra: str, *packages: str) -> None:
    """Raises ImportError, if one of the `packages` that `what` needs and `extra` brings is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{what} need {', '.join(missing)}: pip install 'fdcompile[{extra}]'")


def write_constants(stages: Sequence[StageExport], folder: Path) -> None:
    """Writes `CONSTANTS` into `folder`, if there are any."""
    from safetensors.torch import save_file

    constants = {
        f"{stage.name}.{weight.name}": stage.weights[weight.name].contiguous()
        for stage in stages
        for weight in stage.packaged.weights
        if weight.path is None
    }
    if constants:
        save_file(constants, folder / CONSTANTS)


class PackageFormat(Protocol):
    """Writes stages to files and makes callables of them again.

    Attributes:
        weights: where its callables have them from.
    """

    weights: WeightSource

    def check(self) -> None:
        """Raises ImportError, saying what to install, if a library is missing."""

    def made_with(self, device: torch.device) -> dict[str, str]:
        """Versions and device that a package can be opened with."""

    def write(self, stages: Sequence[StageExport], folder: Path, progress: Callable[[str], None]) -> None:
        """Writes files for `stages` into `folder`."""

    def open(
        self,
        folder: Path,
        stages: Mapping[str, PackagedStage],
        weights: Mapping[str, Mapping[str, Tensor]],
        device: torch.device,
    ) -> dict[str, Lowered]:
        """What runs each stage on `device`.

        `weights` are those to run on, by stage and name; there are none if those in the files are right.
        """


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
