"""Packages stages with AOTInductor, as compiled code that runs on the weights of the pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdcompile.backends.protocols import Lowered, PackageFormat, WeightSource
from fdcompile.backends.stored import PackagedStage, StageExport, StageWeights, device_name

ARCHIVE = "stages.pt2"


class AOTInductor(PackageFormat):
    """One archive with a shared library for each stage.

    The libraries contain no weights. They use the memory of the UNet's weights and of their dense parts in
    `StaticWeights` (``load_constants`` with ``user_managed``), so a fused adapter takes effect immediately. Tensors
    that belong to no module are stored in ``constants.safetensors``.
    """

    weights: WeightSource = "live"

    def check(self) -> None:
        """Does nothing: only torch is needed and, at export, a C++ compiler, which inductor checks itself."""

    def made_with(self, device: torch.device) -> dict[str, str]:
        return {"torch": torch.__version__, "device": device_name(device)}

    def write(self, stages: Sequence[StageExport], folder: Path, progress: Callable[[str], None]) -> None:
        import torch._inductor
        from torch._inductor.package.package import package_aoti

        options = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False}
        compiled: dict[str, Any] = {}
        for stage in stages:
            progress(f"compiling stage {stage.name}")
            module: Any = stage.program.module(check_guards=False)
            with torch.no_grad():
                compiled[stage.name] = torch._inductor.aot_compile(
                    module, tuple(map(laid_out, stage.examples)), options=options
                )
        package_aoti(str(folder / ARCHIVE), compiled)

    def open(
        self, folder: Path, stages: Mapping[str, PackagedStage], weights: StageWeights, device: torch.device
    ) -> dict[str, Lowered]:
        return {name: _open(folder, name, weights[name]) for name in stages}


def _open(folder: Path, name: str, weights: Mapping[str, Tensor]) -> Lowered:
    from torch._inductor.package.package import load_package

    model: Any = load_package(str(folder / ARCHIVE), model_name=name)
    named = {constant: weights[constant] for constant in model.get_constant_fqns()}
    model.load_constants(named, check_full_update=True, user_managed=True)
    return functools.partial(_run, model, named)


def _run(model: Any, weights: Mapping[str, Tensor], *arguments: Tensor) -> tuple[Tensor, ...]:
    """Runs `model`. The argument `weights` keeps the memory alive that `model` reads its weights from."""
    return tuple(model(*map(laid_out, arguments)))


def laid_out(argument: Tensor) -> Tensor:
    """Converts `argument` to the memory format that stages are compiled for."""
    return argument.contiguous(memory_format=layout_of(argument))


def layout_of(argument: Tensor) -> torch.memory_format:
    """Channels-last for 4-d tensors on CUDA, like convolution weights there (see `to_channels_last`)."""
    turned = argument.device.type == "cuda" and argument.ndim == 4
    return torch.channels_last if turned else torch.contiguous_format


FORMAT = AOTInductor()
