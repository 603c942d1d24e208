"""Writes the stages of a pipeline's UNet to a directory that `fdcompile.load` runs without compiling."""

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
from fdcompile.backends.stored import StageExport
from fdcompile.capture.call import Signature, UNetCall
from fdcompile.capture.export import AnySize
from fdcompile.capture.guards import Guards, replaced_code, user_state
from fdcompile.config import Config
from fdcompile.errors import CaptureError
from fdcompile.graph.cut import check_cut
from fdcompile.graph.flops import count_flops
from fdcompile.graph.program import spell_dtype
from fdcompile.graph.ranges import Range
from fdcompile.io import atomic_directory
from fdcompile.package.directory import as_path, check_free
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
    """Writes the stages of ``pipe.unet`` to `directory`, for `load` to run them on the same kind of machine.

    The pipeline is called once, up to its first UNet call, to record the UNet's arguments. The package gets the
    configuration of an optimised pipe, else the default one. The directory appears when it is complete.

    Args:
        pipe: a diffusers pipeline; it is left as it was.
        directory: to make; it may exist if it is empty.
        format: ``"aot_inductor"`` (one archive for this machine's kind of CPU or GPU, which runs on the pipeline's own
            weights and so follows them), ``"onnx"`` (a graph a stage with its weights, and a profile for ``trtexec``),
            ``"tensorrt"`` (an engine a stage with its weights), ``"tensorrt_onnx"`` (likewise, by TensorRT's own ONNX
            parser, and refitted where the pipeline's weights are others), ``"tensorrt_rtx"`` (an engine a stage with
            its weights, by TensorRT for RTX, which needs no GPU to build them, and compiles them to the end on the GPU
            that runs them) or ``"tensorrt_rtx_refit"`` (likewise without weights, refitted with the pipeline's; these
            need a GPU to be built, too).
        height: of the picture in pixels, if the pipeline takes it: smallest, usual, largest; or a fixed number.
            Default: the pipeline's own. Some pipelines want both or neither.
        width: likewise.
        batch: pictures at once, likewise. Guidance is counted in.
        parallel_steps: steps decoded at once, likewise.
        precision: what the UNet's weights must be; None: what they are.
        target: compute capabilities that ``"tensorrt_rtx"`` and ``"tensorrt_rtx_refit"`` build for, such as
            ``["sm89", "sm120"]``; none: all from 8.0 on. The other formats build for the device that the pipeline is
            on.
        arguments: of the call, besides the size; by default a prompt if the pipeline takes one.
        progress: is told what is being done, a line for each stage.

    Returns:
        The directory.

    Raises:
        TypeError: `pipe` is not one that `optimize` accepts, or `directory` no path.
        ValueError: an argument is not one of the above, the pipeline calls its UNet for another size than the one
            given, or the UNet's stages cannot take a range of batch sizes, heights or widths; give one number then.
        FileExistsError: `directory` holds something.
        FileNotFoundError: the folder it is to be in does not exist.
        ImportError: a library that `format` needs is not installed.
        CaptureError: the UNet could not be exported.
        RuntimeError: TensorRT could not build a stage.
        PackageError: a written stage does not compute what it should.
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
    with atomic_directory(folder) as partial:  # from here on other processes are told that it is taken
        _fill(partial, pipe, request, progress)
    return folder


@dataclass(frozen=True)
class _Request:
    """What `export` was asked for.

    Attributes:
        height: of the picture in pixels; None: the pipeline's default.
        width: likewise.
        batch: pictures at once.
        parallel_steps: steps decoded at once.
        arguments: of the pipeline call, besides the size; None: a prompt if the pipeline takes one.
        format: name of the package format.
        writer: the package format.
    """

    height: Range | None
    width: Range | None
    batch: Range
    parallel_steps: Range
    arguments: dict[str, Any] | None
    format: str
    writer: PackageFormat

    def record(self, pipe: Any) -> tuple[UNetCall, AnySize | None]:
        """A call of the usual size, and what the UNet must be captured with to serve the other sizes."""
        height, width = (None if side is None else side.opt for side in (self.height, self.width))
        call = record_call(pipe, height, width, self.arguments)
        return call, any_size(pipe, call, self.height, self.width, self.arguments)

    def latents(self, call: UNetCall, signature: Signature) -> Range:
        """Latents that the UNet gets for `batch` pictures, with or without guidance."""
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
    described = replace(config, backend="auto", process_group=None).to_dict()  # a package's format is its backend
    progress("capturing the UNet")
    call, sizes = request.record(pipe)
    signature, captured = _capture(graph_cache, call, sizes)
    latents, device = request.latents(call, signature), call.tensors[0].device
    sides = None if sizes is None else sizes.sides
    turned = writer.weights == "live" and device.type == "cuda"  # as `load` turns the UNet's
    layout = channels_last(unwrap(pipe.unet), restore=session is None) if turned else nullcontext()
    with layout:
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
    """Writes `stages` to `partial`, and runs what was written if `device` can."""
    writer.write(stages, partial, progress)
    if writer.runs_on(device):
        progress("comparing what was written with the stages")
        check_package(writer, stages, partial, device)
    else:
        progress("the engines were not run, since that needs their GPU; the graphs that they are built from were")


def check_package(written: PackageFormat, stages: Sequence[StageExport], folder: Path, device: torch.device) -> None:
    """Opens the stages that `written` wrote to `folder`, and compares each with its graph at the usual size.

    Raises:
        PackageError: one differs.
    """
    weights = {} if written.weights == "held" else {stage.name: stage.weights for stage in stages}
    lowered = written.open(folder, {stage.name: stage.packaged for stage in stages}, weights, device)
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
            sides = next(axes, {})
            known = {axis: f"{name}*{part}" for axis, (name, part) in sides.items()}
            skipped = int(bool(per_latent))
            shape = [known.get(axis, size) for axis, size in enumerate(shape, start=skipped)]
            tensor = {"dtype": spell_dtype(dtype), "per_latent": per_latent, "shape": shape}
            spelled.append({"path": list(path), "tensor": tensor})
        elif isinstance(value, bool | int | float | str):
            spelled.append({"path": list(path), "value": value})
        else:
            raise ValueError(f"the UNet is called with {path[0]}={value!r}, which a package cannot hold")
    return spelled
