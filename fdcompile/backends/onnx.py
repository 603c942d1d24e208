"""Package the stages as ONNX graphs: for onnxruntime on a CPU, and for TensorRT's own parser."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdcompile.backends import Lowered

if TYPE_CHECKING:
    from fdcompile.package.export import StageExport
    from fdcompile.package.manifest import PackagedStage

OPSET = 23
"""The first with both GroupNormalization on any type and Attention as operations."""


class Onnx:
    """One graph for each stage, its weights in a file beside it, and the shapes for ``trtexec``."""

    live_weights = False

    def check(self) -> None:
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(f"ONNX packages need {', '.join(missing)}: pip install 'fdcompile[onnx]'")

    def made_with(self, device: torch.device) -> dict[str, str]:
        return {"opset": str(OPSET)}

    def write(self, stages: Sequence[StageExport], folder: Path, progress: Callable[[str], None]) -> None:
        for stage in stages:
            progress(f"writing stage {stage.name}")
            names = [port.name for port in stage.packaged.inputs]
            with torch.no_grad():
                program: Any = torch.onnx.export(
                    stage.program,
                    args=stage.examples,
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=names,
                    output_names=[port.name for port in stage.packaged.outputs],
                    verbose=False,
                )
            program.save(str(folder / f"{stage.name}.onnx"), external_data=True)
            (folder / f"{stage.name}.trtexec.txt").write_text(_trtexec(stage, names), encoding="utf-8")

    def open(
        self, folder: Path, stages: Mapping[str, PackagedStage], weights: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Lowered]:
        from onnxruntime import InferenceSession

        lowered: dict[str, Lowered] = {}
        for name, stage in stages.items():
            session = InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
            taken = {value.name for value in session.get_inputs()}
            lowered[name] = functools.partial(_run, session, [(port.name, port.name in taken) for port in stage.inputs])
        return lowered


def _trtexec(stage: StageExport, names: Sequence[str]) -> str:
    """Command line options that build the stage with the shapes of its package."""
    options = [f"--onnx={stage.name}.onnx"]
    for kind, which in (("min", 0), ("opt", 1), ("max", 2)):
        shapes = [
            f"{name}:{'x'.join(map(str, own[which]))}" for name, own in zip(names, stage.shapes, strict=True) if own[0]
        ]
        options.append(f"--{kind}Shapes={','.join(shapes)}")
    return "\n".join([*options, "--stronglyTyped", f"--saveEngine={stage.name}.engine"]) + "\n"


def _run(session: Any, inputs: Sequence[tuple[str, bool]], *arguments: Tensor) -> tuple[Tensor, ...]:
    device = arguments[0].device
    given = {
        name: argument.detach().cpu().numpy()
        for (name, taken), argument in zip(inputs, arguments, strict=True)
        if taken
    }
    return tuple(torch.from_numpy(output).to(device) for output in session.run(None, given))


FORMAT = Onnx()
