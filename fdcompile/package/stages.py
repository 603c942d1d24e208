"""Exports stages for ranges of latents and steps, with the weights that they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.export import Dim

from fdcompile.backends.stored import PackagedStage, Polynomial, StageExport, Weight, value_at
from fdcompile.graph.flops import count_flops
from fdcompile.graph.program import Stage, StagedProgram, TensorSpec
from fdcompile.graph.ranges import Range, Sides
from fdcompile.graph.weights import WeightSlice
from fdcompile.passes.batch_steps import batch_steps
from fdcompile.passes.fold_slices import fold_slices
from fdcompile.runtime.runner import PER_RUN

_TIMESTEPS = Range(1, 50, 1000)
"""Range of the number of steps in a schedule."""


def stage_exports(
    program: StagedProgram,
    batch: Range,
    steps: Range,
    sides: Sides | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[StageExport]:
    """Exports all stages for `batch` latents and, if they take several steps at once, for `steps` steps.

    With `sides` the program and its stages serve several heights and widths.

    Raises:
        ValueError: a stage does not support several steps at once, or has a tensor with more than one entry per latent,
            or with height and width in one axis.
    """
    exports = []
    for name, stage in program.stages.items():
        progress(f"exporting stage {name}")
        stage_steps = _TIMESTEPS if name in PER_RUN else steps if name == "decoder" and program.parallel else None
        exports.append(_Axes(batch, stage_steps, sides).export(stage))
    return exports


@dataclass(frozen=True)
class _Axes:
    """Ranges that a stage is exported for: latents, steps (None: no such axis), heights and widths."""

    batch: Range
    steps: Range | None
    sides: Sides | None

    def export(self, stage: Stage) -> StageExport:
        graph_module = stage.graph_module
        if self.steps is not None:
            try:
                graph_module = batch_steps(stage)
            except NotImplementedError as error:
                raise ValueError(f"stage '{stage.name}' cannot take several steps at once: {error}") from error
        graph_module, slices = fold_slices(graph_module)
        stepwise = () if self.steps is None else stage.stepwise_inputs
        dims = self._dims()
        dynamic = [self._dynamic(stage.name, value, dims, value.name in stepwise) for value in stage.inputs]
        shapes = [self._shapes(value, value.name in stepwise) for value in stage.inputs]
        examples = tuple(
            torch.zeros(_not_one(usual, low, high), dtype=value.dtype, device=stage.device)
            for value, (low, usual, high) in zip(stage.inputs, shapes, strict=True)
        )
        with torch.no_grad():
            program = torch.export.export(graph_module, examples, dynamic_shapes=tuple(dynamic), strict=False)
        weights = dict(program.state_dict) | dict(program.constants)
        per_run = stage.name in PER_RUN
        packaged = PackagedStage(
            inputs=stage.inputs,
            outputs=stage.outputs,
            latents=self.batch,
            parallel_steps=None if per_run else self.steps,
            sampling_steps=self.steps if per_run else None,
            weights=tuple(
                _weight(name, tensor, slices.get(name), in_unet=name in program.state_dict)
                for name, tensor in weights.items()
            ),
            flops=_flops(graph_module, stage, self.steps is not None, self.sides),
            operations=dict(sorted(stage.op_counts.items())),
        )
        return StageExport(stage.name, program, examples, tuple(shapes), weights, packaged)

    def _dims(self) -> dict[str, Any]:
        """The dynamic sizes for ``torch.export``; heights and widths in units of their multiple."""
        ranges = {"B": ("batch", self.batch), "steps": ("steps", self.steps)}
        dims = {
            name: Dim(spelled, min=extent.min, max=extent.max)
            for name, (spelled, extent) in ranges.items()
            if extent is not None and not extent.fixed
        }
        return dims if self.sides is None else dims | self.sides.dims()

    def _dynamic(self, stage_name: str, value: TensorSpec, dims: dict[str, Any], stepwise: bool) -> dict[int, Any]:
        """The dynamic axes of `value`."""
        axes = {0: dims["steps"]} if stepwise and "steps" in dims else {}
        multiple = 1 if self.sides is None else self.sides.latent_multiple
        for axis, size in enumerate(value.shape):
            if isinstance(size, int):
                continue
            symbols = {str(symbol) for symbol in sympy.sympify(size).free_symbols}
            if symbols == {"B"} and (size == "B" or self.batch.fixed):
                dim = dims.get("B")
            elif len(symbols) == 1 and symbols < {"H", "W"}:
                (name,) = symbols
                dim = int(sympy.sympify(size).subs(name, multiple)) * dims[name]
            else:
                what = "more than one entry a latent" if symbols == {"B"} else "its height and width in one"
                alone = "number of images, such as batch=1" if symbols == {"B"} else "height and width"
                raise ValueError(f"stage '{stage_name}' reads {value}, which has {what}: export it for one {alone}")
            if dim is not None:
                axes[axis + int(stepwise)] = dim
        return axes

    def _shapes(self, value: TensorSpec, stepwise: bool) -> tuple[torch.Size, torch.Size, torch.Size]:
        """The smallest, usual and largest shape of `value`."""
        low, usual, high = (
            value.size_for(
                getattr(self.batch, which),
                getattr(self.steps, which) if stepwise else None,
                None if self.sides is None else self.sides.of(which),
            )
            for which in ("min", "opt", "max")
        )
        return low, usual, high


def _not_one(usual: torch.Size, low: torch.Size, high: torch.Size) -> tuple[int, ...]:
    """An example shape without dynamic sizes of one, which torch.export would specialize to."""
    return tuple(2 if size == 1 and least != most else size for size, least, most in zip(usual, low, high, strict=True))


def _flops(
    graph_module: fx.GraphModule, stage: Stage, stepwise: bool, sides: Sides | None
) -> tuple[Polynomial, Polynomial]:
    """FLOPs of a call for each latent, and for each latent and step."""
    batch = 6

    def count(size: tuple[int, int] | None, steps: int | None = None) -> int:
        return count_flops(graph_module, stage.input_shapes(batch, steps, size)) // batch

    if not stepwise:
        return by_area(count, sides), (0,)
    return (
        by_area(lambda size: 2 * count(size, 1) - count(size, 2), sides),
        by_area(lambda size: count(size, 2) - count(size, 1), sides),
    )


def by_area(count: Callable[[tuple[int, int] | None], int], sides: Sides | None) -> Polynomial:
    """Fits `count(size)` by a polynomial in the latents' area (see `Sides.cells`), which is constant without `sides`.

    FLOPs of convolutions grow with the area, those of attention with its square.
    """
    if sides is None:
        return (count(None),)
    ranges, step = (sides.latent_height, sides.latent_width), sides.latent_multiple
    sizes = []
    for factor in (2, 3, 4, 5):
        height, width = (side.opt if side.fixed else factor * step for side in ranges)
        sizes.append((height, width))
    areas = [sides.cells(*size) for size in sizes]
    counts = [count(size) for size in sizes]
    powers = sympy.Matrix([[area**power for power in range(3)] for area in areas[:3]])
    polynomial = tuple(int(coefficient) for coefficient in powers.LUsolve(sympy.Matrix(counts[:3])))
    assert value_at(polynomial, areas[3]) == counts[3], f"FLOPs {counts} at areas {areas} are no polynomial of these"
    return polynomial


def _weight(name: str, tensor: Tensor, part: WeightSlice | None, in_unet: bool) -> Weight:
    whole = name if part is None else part.path
    return Weight(
        name=name,
        path=whole.removeprefix("unet.") if in_unet and whole.startswith("unet.") else None,
        part=None if part is None else (part.dim, part.start, part.stop),
        shape=tuple(tensor.shape),
        stride=tensor.stride(),
        dtype=tensor.dtype,
    )
