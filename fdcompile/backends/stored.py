"""The plain data that a package format is handed: stages on their way to files, and as a manifest describes them."""

from __future__ import annotations

import importlib.util
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from fdcompile.errors import PackageError
from fdcompile.graph.program import DType, StageSpec
from fdcompile.graph.ranges import Range
from fdcompile.graph.weights import WeightSlice

CONSTANTS = "constants.safetensors"
"""File of a package with the tensors that its stages read and no module of the UNet owns."""


Polynomial = tuple[int, ...]
"""Coefficients of the powers of a number, from the zeroth on."""


def value_at(polynomial: Polynomial, number: int) -> int:
    return sum(coefficient * number**power for power, coefficient in enumerate(polynomial))


@dataclass(frozen=True)
class Weight:
    """A tensor that a stage reads besides its inputs.

    Attributes:
        path: its place in the UNet, None if it has none.
        part: dimension, first entry and entry after the last one of the part that is meant; None: all of it.
    """

    name: str
    path: str | None
    part: tuple[int, int, int] | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: DType

    def of(self, unet: nn.Module, part_of: Callable[[Tensor, WeightSlice], Tensor]) -> Tensor:
        """Its value in `unet`: the tensor itself, if all of it is meant, else what `part_of` makes of it.

        Raises:
            PackageError: it has another shape or type there.
        """
        assert self.path is not None
        whole: Tensor = operator.attrgetter(self.path)(unet)
        tensor = whole.detach()
        if type(tensor) is not Tensor:
            raise PackageError(
                f"{self.path}: the package expects a plain tensor, the UNet has a {type(tensor).__name__}"
            )
        if self.part is not None:
            tensor = part_of(whole, WeightSlice(self.path, *self.part))
        actual = tuple(tensor.shape), tensor.stride(), tensor.dtype
        if actual != (expected := (self.shape, self.stride, self.dtype)):
            raise PackageError(
                f"{self.path}: the package expects shape, stride and type {expected}, the UNet has {actual}"
            )
        return tensor


@dataclass(frozen=True)
class PackagedStage(StageSpec):
    """One stage of a package.

    Attributes:
        latents: how many it takes.
        parallel_steps: steps of a group that it takes at once; None: it has no such axis.
        sampling_steps: steps of a schedule that it takes at once; None: it has no such axis.
        weights: what it reads besides its inputs.
        flops: FLOPs per latent of a call, and more of them for each step in it: coefficients of the powers of the
            latents' area (see `Sides.cells`).
        operations: how many of each its graph has.
    """

    latents: Range
    parallel_steps: Range | None
    sampling_steps: Range | None
    weights: tuple[Weight, ...]
    flops: tuple[Polynomial, Polynomial]
    operations: dict[str, int]

    @property
    def op_counts(self) -> Counter[str]:
        return Counter(self.operations)


@dataclass(frozen=True)
class StageExport:
    """A stage on its way to a file.

    Attributes:
        program: its graph, as torch.export sees it: flat inputs in the order of `packaged.inputs`.
        examples: inputs of the usual size.
        shapes: smallest, usual and largest shape of each input.
        weights: values of `packaged.weights`, by name.
        packaged: how the manifest describes it.
    """

    name: str
    program: ExportedProgram
    examples: tuple[Tensor, ...]
    shapes: tuple[tuple[torch.Size, torch.Size, torch.Size], ...]
    weights: dict[str, Tensor]
    packaged: PackagedStage


def check_installed(what: str, extra: str, *packages: str) -> None:
    """Raises ImportError, if one of the `packages` that `what` needs and `extra` brings is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{what} need {', '.join(missing)}: pip install 'fdcompile[{extra}]'")


def write_constants(stages: Sequence[StageExport], folder: Path) -> None:
    """Writes `CONSTANTS` into `folder`, if there are any."""
    constants = {
        f"{stage.name}.{weight.name}": stage.weights[weight.name].contiguous()
        for stage in stages
        for weight in stage.packaged.weights
        if weight.path is None
    }
    if constants:
        save_file(constants, folder / CONSTANTS)


def device_name(device: torch.device) -> str:
    """What compiled code for `device` is tied to: a GPU's model and capability, or a CPU's instruction set."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, capability {major}.{minor}"
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}"
