"""Packages stages as engines of TensorRT for RTX without weights, which are refitted from the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fdcompile.backends.protocols import WeightSource
from fdcompile.backends.stored import StageExport
from fdcompile.backends.tensorrt_rtx import TensorRTRTX


@dataclass(frozen=True)
class TensorRTRTXRefit(TensorRTRTX):
    """One refittable engine for each stage, without weights; those of the pipeline are used.

    Refittable engines lack some fusions. TensorRT for RTX builds them only on a machine with a GPU.
    """

    weights: WeightSource = "refitted"

    def check(self) -> None:
        super().check()
        if not torch.cuda.is_available():
            raise ImportError(
                "Refittable engines of TensorRT for RTX need an NVIDIA GPU to be built, and torch finds none here: "
                "format='tensorrt_rtx' builds engines with weights without one"
            )

    def configure(self, stage: StageExport, network: Any, config: Any) -> None:
        import tensorrt_rtx

        super().configure(stage, network, config)
        names = [weight.name for weight in stage.packaged.weights]
        if lost := [name for name in names if not network.mark_weights_refittable(name)]:
            raise RuntimeError(f"stage '{stage.name}': the parsed network has no weights {', '.join(lost)} to refit")
        config.set_flag(tensorrt_rtx.BuilderFlag.REFIT_INDIVIDUAL)  # constants of the graph are not refittable
        config.set_flag(tensorrt_rtx.BuilderFlag.STRIP_PLAN)


FORMAT = TensorRTRTXRefit()
