"""What a backend and a package format are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, fx

from fdcompile.backends.stored import PackagedStage, StageExport

Lowered = Callable[..., tuple[Tensor, ...]]
"""A lowered stage: takes the stage's inputs in order, returns its outputs in order."""


@runtime_checkable
class Backend(Protocol):
    """Turns a stage's graph into something that runs."""

    @property
    def name(self) -> str: ...

    def lower(self, graph_module: fx.GraphModule, name: str) -> Lowered:
        """Lowers `graph_module`, the stage called `name`. It may compile now or at the first call."""


WeightSource = Literal["live", "copied", "held", "refitted"]
"""Whose weights a package's callables run on: ``"live"``, the UNet's; ``"held"``, those in the files; ``"copied"``,
those in the files or, where they differ, the UNet's, put in their place; ``"refitted"``, copies of the UNet's, because
the files have none."""


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

    def for_targets(self, targets: Sequence[str]) -> PackageFormat:
        """It, for the GPUs called `targets`.

        Raises:
            ValueError: one is not known, or this format builds for none but the one that is here.
        """
        raise ValueError(f"target={','.join(targets)}: only tensorrt_rtx and tensorrt_rtx_refit build for chosen GPUs")

    def runs_on(self, device: torch.device) -> bool:
        """Whether what it writes for `device` can be run there, to compare it with the stages."""
        return True

    def write(self, stages: Sequence[StageExport], folder: Path, progress: Callable[[str], None]) -> None:
        """Writes files for `stages` into `folder`."""

    def describe(self, folder: Path) -> dict[str, Any]:
        """What the manifest says about the files in `folder`, for `check_files`."""
        return {}

    def check_files(self, folder: Path, description: Mapping[str, Any], device: torch.device) -> None:
        """Refuses files that cannot run on `device`, without reading all of them.

        Raises:
            PackageError: they cannot, and why.
        """
        return

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
