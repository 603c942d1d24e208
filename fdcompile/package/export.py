"""Exports the stages of a pipeline's UNet to a directory, which `fdcompile.load` opens without compiling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx, nn

from fdcompile.backends import package_format
from fdcompile.backends.compare import check_stage
from fdcompile.backends.protocols import PackageFormat
from fdcompile.backends.stored import StageExport, write_constants
from fdcompile.capture.call import Signature, UNetCall
from fdcompile.capture.export import AnySize
from fdcompile.capture.guards import Guards, replaced_code, user_state
from fdcompile.config import Config
from fdcompile.errors import CaptureError
from fdcompile.graph.cut import check_cut
from fdcompile.graph.flops import count_flops
from fdcompile.graph.program import spell_dtype
from fdcompile.graph.ranges import Range
from fdcompile.io import as_path, atomic_directory, check_free
from fdcompile.package.manifest import SCHEMA, Manifest, file_digest
from fdcompile.package.sizes import any_size
from fdcompile.package.stages import by_area, stage_exports
from fdcompile.passes import enabled_passes, run_passes
from fdcompile.pipeline.check import check_pipe
from fdcompile.pipeline.identity import describe_unet
from fdcompile.pipeline.record import record_call
from fdcompile.pipeline.session import find_session, graph_cache_of
from fdcompile.runtime.caller import unwrap
from fdcompile.runtime.graph_cache import GraphCache
from fdcompile.runtime.layout import channels_last
from fdcompile.runtime.runner import TRACING
from fdcompile.version import __version__


def export(
    pipe: Any,
    directory: str | Path,
    *,
    format: Literal["aot_inductor", "onnx", "tensorrt", "tensorrt_onnx", "tensorrt_rtx", "tensorrt_rtx_refit"],
    height: int | tuple[int, int, int] | None = None,
    width: int | tuple[int, int, int] | None = None,
    batch: int | tuple[int, int, int] = (1, 1, 4),
    parallel_steps: int | tuple[int, int, int] = (1, 3, 16),
    precision: torch.dtype | None = None,
    target: Sequence[str] = (),
    arguments: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """Exports the stages of ``pipe.unet`` to `directory`, which `load` opens on the same kind of machine.

    The pipeline is called up to its first UNet call, to record the arguments of the UNet; for a range of heights or
    widths, once more for each. The package has the configuration of an optimized pipeline, or the default one. The
    directory is created when it is complete.

    Args:
        pipe: a diffusers pipeline, which is not changed.
        directory: the directory to create. It may exist if it is empty.
        format: format of the package:

            - ``"aot_inductor"``: one archive of compiled code for the CPU or GPU of this machine, which runs on the
              weights of the pipeline.
            - ``"onnx"``: a graph with weights for each stage, and a file of options for ``trtexec``.
            - ``"tensorrt"``: a TensorRT engine with weights for each stage.
            - ``"tensorrt_onnx"``: engines built with TensorRT's ONNX parser, refitted if the weights of the pipeline
              differ.
            - ``"tensorrt_rtx"``: an engine of TensorRT for RTX with weights for each stage. Building needs no GPU; the
              compilation is completed on the GPU that runs it.
            - ``"tensorrt_rtx_refit"``: the same without weights, refitted with those of the pipeline. Building needs a
              GPU.
        height: height of the image in pixels: (smallest, usual, largest), or a fixed number. Default: that of the
            pipeline. Some pipelines require both `height` and `width`, or neither.
        width: width, like `height`.
        batch: number of images per call, like `height`. Guidance, which doubles the UNet's batch, is accounted for.
        parallel_steps: number of steps to decode at once, like `height`.
        precision: expected type of the UNet's weights; None accepts any.
        target: compute capabilities to build for with ``"tensorrt_rtx"`` and ``"tensorrt_rtx_refit"``, such as
            ``["sm89", "sm120"]``; empty for all from 8.0 on. Other formats build for the device of the pipeline.
        arguments: arguments of the pipeline call, besides the size; by default a prompt if the pipeline has one.
        progress: called with a message for each step of the export.

    Returns:
        The directory.

    Raises:
        TypeError: `pipe` is not accepted by `optimize`, or `directory` is not a path.
        ValueError: an argument is invalid, the pipeline calls its UNet for another size, or the stages do not support a
            range of batch sizes, heights or widths, but only a fixed number.
        FileExistsError: `directory` is not empty.
        FileNotFoundError: the parent of `directory` does not exist.
        ImportError: a library that `format` needs is not installed.
        CaptureError: the UNet could not be exported.
        RuntimeError: TensorRT could not build a stage.
        PackageError: the results of a written stage differ from those of its graph.
    """
    folder = as_path(directory, "export")
    request = _Request(
        height=None if height is None else Range.parse("height", height),
        width=None if width is None else Range.parse("width", width),
        batch=Range.parse("batch", batch),
        parallel_steps=Range.parse("parallel_steps", parallel_steps),
        arguments=arguments,
        format=format,
        writer=package_format(format).for_targets(target) if target else package_format(format),
    )
    check_pipe(pipe)
    _check_precision(pipe.unet, precision)
    check_free(folder)
    request.writer.check()
    with atomic_directory(folder) as partial:  # reserves the directory for this process
        _fill(partial, pipe, request, progress)
    return folder


@dataclass(frozen=True)
class _Request:
    """Parsed arguments of `export`, and its package format, `writer`."""

    height: Range | None
    width: Range | None
    batch: Range
    parallel_steps: Range
    arguments: dict[str, Any] | None
    format: str
    writer: PackageFormat

    def record(self, pipe: Any) -> tuple[UNetCall, AnySize | None]:
        """Records a UNet call of the usual size, and symbolic sizes for the capture; None if the sizes are fixed."""
        height, width = (None if side is None else side.opt for side in (self.height, self.width))
        call = record_call(pipe, height, width, self.arguments)
        return call, any_size(pipe, call, self.height, self.width, self.arguments)

    def latents(self, call: UNetCall, signature: Signature) -> Range:
        """Range of the UNet's batch size for `batch` images, with or without guidance."""
        if signature.batch is not None and self.batch != Range(1, 1, 1):
            raise ValueError("this UNet can be captured for one batch size only: export it with batch=1")
        if self.batch.fixed:
            return Range(*(call.batch * self.batch.max,) * 3)
        return Range(self.batch.min, call.batch * self.batch.opt, call.batch * self.batch.max)


def _fill(partial: Path, pipe: Any, request: _Request, progress: Callable[[str], None]) -> None:
    """Captures the UNet of `pipe` and writes its stages and their manifest to the directory `partial`."""
    session, writer = find_session(pipe), request.writer
    config = Config() if session is None else session.config
    graph_cache = graph_cache_of(unwrap(pipe.unet))
    _check_supported(graph_cache.guards, graph_cache.unet)
    # The format of a package replaces the backend.
    described = replace(config, backend="auto", process_group=None).to_dict()
    progress("capturing the UNet")
    call, sizes = request.record(pipe)
    signature, captured = _capture(graph_cache, call, sizes)
    latents, device = request.latents(call, signature), call.tensors[0].device
    sides = None if sizes is None else sizes.sides
    turned = writer.weights == "live" and device.type == "cuda"  # `load` converts the UNet in the same way
    with channels_last(unwrap(pipe.unet), restore=session is None) if turned else nullcontext():
        with TRACING:
            program = run_passes(captured, config.recompute, enabled_passes(config.disabled_passes), config.forecasts)
            check_cut(program, config.recompute)
            stages = stage_exports(program, latents, request.parallel_steps, sides, progress)
            _write(writer, stages, partial, device, progress)
        Manifest(
            schema=SCHEMA,
            format=request.format,
            made_with={"fdcompile": __version__, **writer.made_with(device)},
            unet=describe_unet(graph_cache.unet),
            signature=_spell_signature(signature, sizes),
            config=described,
            latents=latents,
            parallel_steps=request.parallel_steps,
            sides=sides,
            inputs=program.inputs,
            output=program.output,
            stages={stage.name: stage.packaged for stage in stages},
            stock_flops=by_area(
                lambda size: count_flops(captured, program.input_shapes(latents.opt, size)) // latents.opt, sides
            ),
            files={path.name: file_digest(path) for path in sorted(partial.iterdir())},
            description=writer.describe(partial),
            state=user_state(graph_cache.unet),
        ).write(partial)


def _write(
    writer: PackageFormat,
    stages: Sequence[StageExport],
    partial: Path,
    device: torch.device,
    progress: Callable[[str], None],
) -> None:
    """Writes `stages` to `partial`, and compares their results if `device` can run them."""
    writer.write(stages, partial, progress)
    if writer.weights != "held":
        write_constants(stages, partial)
    if writer.runs_on(device):
        progress("comparing what was written with the stages")
        check_package(writer, stages, partial, device)
    else:
        progress("the engines were not run, since that needs their GPU; the graphs that they are built from were")


def check_package(writer: PackageFormat, stages: Sequence[StageExport], folder: Path, device: torch.device) -> None:
    """Opens the stages that `writer` wrote to `folder`, and compares each with its graph at the usual size.

    Raises:
        PackageError: the results of a stage differ.
    """
    weights = {} if writer.weights == "held" else {stage.name: stage.weights for stage in stages}
    lowered = writer.open(folder, {stage.name: stage.packaged for stage in stages}, weights, device)
    for stage in stages:
        check_stage(stage, lowered[stage.name])


def _capture(graph_cache: GraphCache, call: UNetCall, sizes: AnySize | None) -> tuple[Signature, fx.GraphModule]:
    try:
        return graph_cache.capture(call, sizes)
    except CaptureError as error:
        if sizes is None:
            raise
        raise CaptureError(
            f"this UNet cannot be exported for several sizes, try one height and width: {error}"
        ) from error


def _check_supported(guards: Guards, unet: nn.Module) -> None:
    guards.refresh()
    if guards.unsupported_reason is not None:
        raise ValueError(f"this UNet cannot be exported: {guards.unsupported_reason}")
    if replaced := replaced_code(unet):
        raise ValueError(
            f"this UNet cannot be exported: {', '.join(replaced)} was replaced by other code, which the process that "
            f"loads the package may not have. Put the library's back, or set an attention processor"
        )


def _check_precision(unet: nn.Module, precision: torch.dtype | None) -> None:
    dtype = next(unet.parameters()).dtype
    if precision is not None and precision is not dtype:
        raise ValueError(f"precision={precision}: this UNet's weights are {dtype}: call pipe.to({precision}) first")


def _spell_signature(signature: Signature, sizes: AnySize | None) -> list[dict[str, Any]]:
    spelled: list[dict[str, Any]] = []
    axes = iter(() if sizes is None else sizes.axes)
    for path, value in signature.leaves:
        if isinstance(value, tuple):
            dtype, _, per_latent, shape = value
            known = {axis: f"{name}*{part}" for axis, (name, part) in next(axes, {}).items()}
            shape = [known.get(axis, size) for axis, size in enumerate(shape, start=int(per_latent > 0))]
            tensor = {"dtype": spell_dtype(dtype), "per_latent": per_latent, "shape": shape}
            spelled.append({"path": list(path), "tensor": tensor})
        elif isinstance(value, bool | int | float | str):
            spelled.append({"path": list(path), "value": value})
        else:
            raise ValueError(f"the UNet is called with {path[0]}={value!r}, which a package cannot hold")
    return spelled
