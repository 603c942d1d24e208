"""Protocols of backends and package formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, fx

from fdcompile.backends.stored import PackagedStage, StageExport, StageWeights

Lowered = Callable[..., tuple[Tensor, ...]]
"""A lowered stage: takes the inputs of the stage in order, and returns its outputs in order."""


@runtime_checkable
class Backend(Protocol):
    """Lowers graphs of stages to callables."""

    @property
    def name(self) -> str: ...

    def lower(self, graph_module: fx.GraphModule, name: str) -> Lowered:
        """Returns a callable for stage `name`. It may be compiled here or at its first call."""


WeightSource = Literal["live", "copied", "held", "refitted"]
"""Source of the weights of a package's callables: ``"live"``, the tensors of the UNet; ``"held"``, the files;
``"copied"``, the files, or copies of the UNet's weights if those differ; ``"refitted"``, copies of the UNet's weights,
because the files contain none."""


class PackageFormat(Protocol):
    """Writes stages to files, and opens them as callables.

    Attributes:
        weights: source of the callables' weights.
    """

    weights: WeightSource

    def check(self) -> None:
        """Raises ImportError with what to install if a library is missing."""

    def made_with(self, device: torch.device) -> dict[str, str]:
        """Versions of libraries, and the device, that must be equal where a package is opened."""

    def for_targets(self, targets: Sequence[str]) -> PackageFormat:
        """Returns this format for the GPU architectures `targets`.

        Raises:
            ValueError: a target is unknown, or this format builds only for the local device.
        """
        raise ValueError(f"target={','.join(targets)}: only tensorrt_rtx and tensorrt_rtx_refit build for chosen GPUs")

    def runs_on(self, device: torch.device) -> bool:
        """Whether files exported on `device` can be run there, to compare them with the stages."""
        return True

    def write(self, stages: Sequence[StageExport], folder: Path, progress: Callable[[str], None]) -> None:
        """Writes files for `stages` into `folder`."""

    def describe(self, folder: Path) -> dict[str, Any]:
        """Description of the files in `folder` for the manifest, which `check_files` receives."""
        return {}

    def check_files(self, folder: Path, description: Mapping[str, Any], device: torch.device) -> None:
        """Checks, without reading all of it, that the package in `folder` can run on `device`.

        Raises:
            PackageError: a file is damaged or cannot run on `device`.
        """
        return

    def open(
        self, folder: Path, stages: Mapping[str, PackagedStage], weights: StageWeights, device: torch.device
    ) -> dict[str, Lowered]:
        """Returns one callable per stage, placed on `device`.

        Args:
            folder: folder of the files.
            stages: stages by name.
            weights: weights to use instead of those in the files; empty for none.
            device: the device to run on.
        """
