"""Stages as passed to package formats, and as described in manifests."""

from __future__ import annotations

import importlib.util
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
"""File of a package with the constants of its stages: tensors that belong to no module of the UNet."""


StageWeights = Mapping[str, Mapping[str, Tensor]]
"""Weights by stage and name."""

Polynomial = tuple[int, ...]
"""Coefficients, starting with that of the zeroth power."""


def value_at(polynomial: Polynomial, number: int) -> int:
    return sum(coefficient * number**power for power, coefficient in enumerate(polynomial))


@dataclass(frozen=True)
class Weight:
    """Description of a weight that a stage reads.

    Attributes:
        name: name in the stage.
        path: path in the UNet; None if it belongs to no module.
        part: dimension, start and stop of the slice that is read; None for the whole tensor.
    """

    name: str
    path: str | None
    part: tuple[int, int, int] | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: DType

    def of(
        self, unet: nn.Module, part_of: Callable[[Tensor, WeightSlice], Tensor] = lambda weight, part: part.of(weight)
    ) -> Tensor:
        """Returns the weight in `unet`: the tensor itself, or the result of `part_of` for a slice.

        Raises:
            PackageError: the tensor in `unet` is no plain tensor, or has another shape, stride or type.
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
    """Description of one stage of a package.

    Attributes:
        latents: range of the number of latents.
        parallel_steps: range of the steps of a group in one call; None if the stage has no such axis.
        sampling_steps: range of the steps of a schedule in one call; None if the stage has no such axis.
        weights: weights that the stage reads.
        flops: FLOPs per latent of a call, and additional FLOPs per latent and step, as polynomials in the latents' area
            (see `Sides.cells`).
        operations: number of operations of each kind in its graph.
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
    """A stage to be written to files.

    Attributes:
        name: name of the stage.
        program: graph of the stage as exported by ``torch.export``, with inputs in the order of `packaged.inputs`.
        examples: inputs of the usual size.
        shapes: smallest, usual and largest shape of each input.
        weights: values of `packaged.weights`, by name.
        packaged: description for the manifest.
    """

    name: str
    program: ExportedProgram
    examples: tuple[Tensor, ...]
    shapes: tuple[tuple[torch.Size, torch.Size, torch.Size], ...]
    weights: dict[str, Tensor]
    packaged: PackagedStage


def check_installed(what: str, extra: str, *packages: str) -> None:
    """Raises ImportError if one of `packages` is missing: `what` needs them, and the extra `extra` installs them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{what} need {', '.join(missing)}: pip install 'fdcompile[{extra}]'")


def write_constants(stages: Sequence[StageExport], folder: Path) -> None:
    """Writes `CONSTANTS` to `folder` if `stages` have constants."""
    constants = {
        f"{stage.name}.{weight.name}": stage.weights[weight.name].contiguous()
        for stage in stages
        for weight in stage.packaged.weights
        if weight.path is None
    }
    if constants:
        save_file(constants, folder / CONSTANTS)


def device_name(device: torch.device) -> str:
    """Describes the device that compiled code depends on: model and capability of a GPU, instruction set of a CPU."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, capability {major}.{minor}"
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}"
