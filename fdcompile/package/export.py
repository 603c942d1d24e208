"""Write the stages of a pipeline's UNet to a directory that `fdcompile.load` runs without compiling."""

from __future__ import annotations

import importlib
import inspect
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from fdcompile import __version__
from fdcompile.api import check_pipe
from fdcompile.backends import PackageFormat
from fdcompile.capture import Signature, UNetCall
from fdcompile.compiled import PER_RUN, TRACING
from fdcompile.config import Config, NoiseInjection
from fdcompile.flops import count_flops
from fdcompile.hooks import UNetHook, find_hook
from fdcompile.package.check import check_package
from fdcompile.package.manifest import (
    FORMATS,
    SCHEMA,
    Manifest,
    PackagedStage,
    Port,
    Range,
    Weight,
    config_digest,
    file_digest,
    spell_dtype,
    weights_digest,
)
from fdcompile.passes import batch_steps, fold_slices, run_passes
from fdcompile.program import Stage, StagedProgram, Value, WeightSlice
from fdcompile.structure import fingerprint

_TIMESTEPS = Range(1, 50, 1000)
"""How many steps a schedule may have."""


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


def export(
    pipe: Any,
    directory: str | Path,
    *,
    format: Literal["aot_inductor", "onnx", "tensorrt", "tensorrt_onnx"],
    height: int | None = None,
    width: int | None = None,
    batch: int | tuple[int, int, int] = (1, 1, 4),
    parallel_steps: int | tuple[int, int, int] = (1, 3, 16),
    precision: torch.dtype | None = None,
    arguments: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes the stages of ``pipe.unet`` to `directory`, for `load` to run them on the same kind of machine.

    The pipeline is called once, up to its first UNet call, to see what it hands its UNet. An optimised pipe's
    configuration goes into the package, else the default one. The directory appears when everything in it is complete.

    Args:
        pipe: a diffusers pipeline; it is left as it was.
        directory: to make; it may exist if it is empty.
        format: ``"aot_inductor"`` (one archive for this machine's kind of CPU or GPU, which runs on the pipeline's own
            weights and so follows them), ``"onnx"`` (a graph a stage with its weights, and a profile for ``trtexec``),
            ``"tensorrt"`` (an engine a stage with its weights) or ``"tensorrt_onnx"`` (likewise, by TensorRT's own ONNX
            parser, and refitted where the pipeline's weights are others).
        height: of the picture in pixels, if the pipeline takes it. Default: the pipeline's own.
        width: likewise.
        batch: pictures at once: smallest, usual, largest; or a fixed number. Guidance is counted in.
        parallel_steps: steps decoded at once, likewise.
        precision: what the UNet's weights must be; None: what they are.
        arguments: of the call, besides the size; by default a prompt if the pipeline takes one.
        progress: is told what is being done, a line for each stage.

    Returns:
        The directory.

    Raises:
        TypeError: `pipe` is not one that `optimize` accepts.
        ValueError: an argument is not one of the above, or the UNet's stages cannot take a range of batch sizes; give
            one number of pictures then.
        FileExistsError: `directory` holds something.
        FileNotFoundError: the folder it is to be in does not exist.
        ImportError: a library that `format` needs is not installed.
        CaptureError: the UNet could not be exported.
        RuntimeError: TensorRT could not build a stage.
        PackageError: a written stage does not compute what it should.
    """
    folder = Path(directory)
    batches, steps = Range.parse("batch", batch), Range.parse("parallel_steps", parallel_steps)
    written = package_format(format)
    check_pipe(pipe)
    _check_precision(pipe.unet, precision)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty: choose another directory")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{folder}: there is no folder {str(folder.parent)!r}")
    written.check()
    hook = find_hook(pipe) or UNetHook(pipe, Config())  # which is not attached
    _check_unmanaged(hook)
    described = _describe(hook.config)
    progress("capturing the UNet")
    call = record_call(pipe, height, width, arguments)
    signature, captured = hook.executor.capture(call)
    _check_unmanaged(hook)  # the capture may have found it out
    latents = _latents(call, signature, batches)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        with TRACING:
            program = run_passes(captured, hook.config.fresh, hook.config.passes)
            stages = stage_exports(program, latents, steps, fold=written.weights != "live", progress=progress)
            written.write(stages, partial, progress)
            progress("comparing what was written with the stages")
            check_package(written, stages, partial, call.tensors[0].device)
        files = {path.name: file_digest(path) for path in sorted(partial.iterdir())}
        manifest = Manifest(
            schema=SCHEMA,
            format=format,
            made_with={"fdcompile": __version__, **written.made_with(call.tensors[0].device)},
            unet=describe_unet(pipe.unet),
            signature=_spell_signature(signature),
            fixed_batch=signature.batch,
            config=described,
            batch=latents,
            steps=steps,
            inputs=_ports(program.inputs),
            output=program.output,
            stages={stage.name: stage.packaged for stage in stages},
            stock_flops=count_flops(captured, program.input_shapes(latents.opt)) // latents.opt,
            files=files,
        )
        manifest.write(partial)
        partial.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _latents(call: UNetCall, signature: Signature, pictures: Range) -> Range:
    """Latents that the UNet sees for so many pictures, whether or not guidance is switched on."""
    if signature.batch is not None and pictures != Range(1, 1, 1):
        raise ValueError("this UNet can be captured for one batch size only: export it with batch=1")
    if pictures.fixed:
        return Range(*(call.batch * pictures.max,) * 3)
    return Range(pictures.min, call.batch * pictures.opt, call.batch * pictures.max)


def package_format(name: str) -> PackageFormat:
    """What writes and opens packages of the format called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in FORMATS:
        raise ValueError(f"format={name!r}: expected one of {', '.join(FORMATS)}")
    module = importlib.import_module(f"fdcompile.backends.{name}")
    chosen: PackageFormat = module.FORMAT
    return chosen


def describe_unet(unet: Any, with_weights: bool = True) -> dict[str, str]:
    """Class of `unet` and digests of its configuration, its modules and, which reads them all, its weights."""
    own = {"class": type(unet).__name__, "configuration": config_digest(unet), "modules": fingerprint(unet)}
    return own | ({"weights": weights_digest(unet)} if with_weights else {})


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
        dynamic.append(axes | ({0: names["steps"]} if stepwise else {}))
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
        inputs=_ports(stage.inputs),
        outputs=_ports(stage.outputs),
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


def _ports(values: Sequence[Value]) -> tuple[Port, ...]:
    return tuple(Port(value.name, value.shape, spell_dtype(value.dtype), value.time.value) for value in values)


def _check_unmanaged(hook: UNetHook) -> None:
    if (reason := hook.executor.managed()) is not None:
        raise ValueError(f"this UNet cannot be exported: {reason}")


def _check_precision(unet: nn.Module, precision: torch.dtype | None) -> None:
    own = next(unet.parameters()).dtype
    if precision is not None and precision is not own:
        raise ValueError(f"precision={precision}: this UNet's weights are {own}: call pipe.to({precision}) first")


def _describe(config: Config) -> dict[str, Any]:
    key_steps = config.key_steps
    if callable(key_steps):
        raise ValueError("key_steps is a function, which a package cannot hold: give the steps, or a name or stride")
    noise = config.noise_injection
    return {
        "key_steps": key_steps if isinstance(key_steps, str | int) else list(key_steps),
        "fresh": list(config.fresh),
        "disabled_passes": list(config.disabled_passes),
        "noise_injection": asdict(noise) if isinstance(noise, NoiseInjection) else noise,
    }


def _spell_signature(signature: Signature) -> list[dict[str, Any]]:
    spelled: list[dict[str, Any]] = []
    for path, value in signature.leaves:
        if isinstance(value, tuple):
            dtype, _, per_latent, shape = value
            tensor = {"dtype": spell_dtype(dtype), "per_latent": per_latent, "shape": list(shape)}
            spelled.append({"path": list(path), "tensor": tensor})
        elif isinstance(value, bool | int | float | str):
            spelled.append({"path": list(path), "value": value})
        else:
            raise ValueError(f"the UNet is called with {path[0]}={value!r}, which a package cannot hold")
    return spelled


class _Recorded(BaseException):
    """Ends the pipeline's call at its first UNet call. No pipeline catches it."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.call = args, kwargs


def record_call(pipe: Any, height: int | None, width: int | None, arguments: dict[str, Any] | None) -> UNetCall:
    """What the pipeline hands its UNet in a call for one picture.

    Raises:
        ValueError: the pipeline does not take one of `arguments`, or does not call its UNet.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    given = {"prompt": "a photograph"} if arguments is None and "prompt" in parameters else dict(arguments or {})
    sizes = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    if unknown := [name for name in (*sizes, *given) if name not in parameters]:
        raise ValueError(f"{type(pipe).__name__} takes no {unknown[0]}: leave it out")

    def interrupt(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Recorded(args, kwargs)

    handle = pipe.unet.register_forward_pre_hook(interrupt, with_kwargs=True)
    try:
        pipe(**given | sizes)
    except _Recorded as recorded:
        return UNetCall.parse(inspect.signature(type(pipe.unet).forward.__get__(pipe.unet)), *recorded.call)
    finally:
        handle.remove()
    raise ValueError(f"{type(pipe).__name__} made no call of its UNet with arguments {given}")
