"""Stages on their way to files: each exported for ranges of latents and steps, with the weights that it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.export import Dim

from fdcompile.backends.stored import PackagedStage, Port, Range, StageExport, Weight, spell_dtype
from fdcompile.graph.flops import count_flops
from fdcompile.graph.program import Stage, StagedProgram, Value
from fdcompile.graph.weights import WeightSlice
from fdcompile.passes.batch_steps import batch_steps
from fdcompile.passes.fold_slices import fold_slices
from fdcompile.runtime.staged import PER_RUN

_TIMESTEPS = Range(1, 50, 1000)
"""How many steps a schedule may have."""


def stage_exports(
    program: StagedProgram,
    batch: Range,
    steps: Range,
    fold: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> list[StageExport]:
    """Exports every stage for `batch` latents, and those that take several steps at once for `steps` of them.

    With `fold` a stage has the parts of weights that it reads, and not the UNet's whole ones.

    Raises:
        ValueError: a stage cannot take several steps at once, or its tensors are more than one entry a latent.
    """
    found = []
    for name, stage in program.stages.items():
        progress(f"exporting stage {name}")
        own_steps = _TIMESTEPS if name in PER_RUN else steps if name == "decoder" and program.parallel else None
        # What guidance stacks may turn out equal or not, so the shared part takes a third to all of the batch.
        own_batch = Range(-(-batch.min // 3), -(-batch.opt // 2), batch.max) if name == "shared" else batch
        found.append(_export_stage(stage, own_batch, own_steps, fold))
    return found


def _export_stage(stage: Stage, batch: Range, steps: Range | None, fold: bool) -> StageExport:
    graph_module = stage.graph_module
    slices: dict[str, WeightSlice] = {}
    if steps is not None:
        try:
            graph_module = batch_steps(stage)
        except NotImplementedError as error:
            raise ValueError(f"stage '{stage.name}' cannot take several steps at once: {error}") from error
    if fold:
        graph_module, slices = fold_slices(graph_module)
    names = {"batch": None if batch.fixed else Dim("batch", min=batch.min, max=batch.max)}
    names["steps"] = None if steps is None or steps.fixed else Dim("steps", min=steps.min, max=steps.max)
    dynamic, shapes = [], []
    for value in stage.inputs:
        stepwise = steps is not None and value.name in stage.stepwise_inputs
        if not batch.fixed and any(isinstance(size, str) and size != "B" for size in value.shape):
            raise ValueError(
                f"stage '{stage.name}' reads {value}, which has more than one entry a latent: "
                f"export it for one number of pictures, such as batch=1"
            )
        axes = {int(stepwise) + axis: names["batch"] for axis, size in enumerate(value.shape) if size == "B"}
        axes |= {0: names["steps"]} if stepwise else {}
        dynamic.append({axis: name for axis, name in axes.items() if name is not None})
        own_steps = steps if stepwise else None
        low, usual, high = (
            value.shape_for(getattr(batch, which), None if own_steps is None else getattr(own_steps, which)).size
            for which in ("min", "opt", "max")
        )
        shapes.append((low, usual, high))
    examples = tuple(
        torch.zeros(_not_one(own, low, high), dtype=value.dtype, device=value.device)
        for value, (low, own, high) in zip(stage.inputs, shapes, strict=True)
    )
    with torch.no_grad():
        program = torch.export.export(graph_module, examples, dynamic_shapes=tuple(dynamic), strict=False)
    weights = dict(program.state_dict) | dict(program.constants)
    packaged = PackagedStage(
        inputs=ports(stage.inputs),
        outputs=ports(stage.outputs),
        batch=batch,
        steps=steps,
        weights=tuple(
            _weight(name, tensor, slices.get(name), in_unet=name in program.state_dict)
            for name, tensor in weights.items()
        ),
        flops=_flops(graph_module, stage, steps is not None),
        op_counts=dict(sorted(stage.op_counts.items())),
    )
    return StageExport(stage.name, program, examples, tuple(shapes), weights, packaged)


def _not_one(usual: torch.Size, low: torch.Size, high: torch.Size) -> tuple[int, ...]:
    """A shape to export with: torch.export takes a size of one for a constant."""
    return tuple(2 if own == 1 and least != most else own for own, least, most in zip(usual, low, high, strict=True))


def _flops(graph_module: fx.GraphModule, stage: Stage, stepwise: bool) -> tuple[int, int]:
    """FLOPs of a call: per latent, and per latent and step."""
    batch = 6
    if not stepwise:
        return count_flops(graph_module, stage.input_shapes(batch)) // batch, 0
    one, two = (count_flops(graph_module, stage.input_shapes(batch, steps)) // batch for steps in (1, 2))
    return 2 * one - two, two - one


def _weight(name: str, tensor: Tensor, part: WeightSlice | None, in_unet: bool) -> Weight:
    whole = name if part is None else part.path
    return Weight(
        name=name,
        path=whole.removeprefix("unet.") if in_unet and whole.startswith("unet.") else None,
        part=None if part is None else (part.dim, part.start, part.stop),
        shape=tuple(tensor.shape),
        stride=tensor.stride(),
        dtype=spell_dtype(tensor.dtype),
    )


def ports(values: Sequence[Value]) -> tuple[Port, ...]:
    return tuple(Port(value.name, value.shape, spell_dtype(value.dtype), value.time.value) for value in values)
