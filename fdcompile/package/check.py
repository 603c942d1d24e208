"""Checks that written stages compute the same as their graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fdcompile.backends.compare import check_stage
from fdcompile.backends.protocols import PackageFormat

if TYPE_CHECKING:
    from fdcompile.backends.stored import StageExport


def check_package(written: PackageFormat, stages: Sequence[StageExport], folder: Path, device: torch.device) -> None:
    """Opens the stages that `written` wrote to `folder`, and compares each with its graph at the usual size.

    Raises:
        PackageError: one differs.
    """
    weights = {} if written.weights == "held" else {stage.name: stage.weights for stage in stages}
    lowered = written.open(folder, {stage.name: stage.packaged for stage in stages}, weights, device)
    for stage in stages:
        check_stage(stage, lowered[stage.name])
