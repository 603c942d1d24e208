"""fdcompile: a compiler that computes the values of a diffusion UNet as soon as their inputs are known."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fdcompile.version import __version__ as __version__

if TYPE_CHECKING:
    from fdcompile.api import explain, optimize, restore, warmup
    from fdcompile.config import DECODER, PARTIAL_ENCODER, Config, NoiseInjection, Planned, deep_feature_caching
    from fdcompile.errors import CaptureError, FdcompileError, PackageError, PassError
    from fdcompile.measure.variant import Variant
    from fdcompile.miniature import load_miniature
    from fdcompile.package.export import export
    from fdcompile.package.load import load
    from fdcompile.planning.plan import Plan
    from fdcompile.planning.planner import plan
    from fdcompile.report import Report
    from fdcompile.tools.evaluate.evaluate import evaluate
    from fdcompile.tools.gate.gate import gate
    from fdcompile.tools.generate.generate import generate
    from fdcompile.tools.study.study import Study, study

__all__ = [
    "DECODER",
    "PARTIAL_ENCODER",
    "CaptureError",
    "Config",
    "FdcompileError",
    "NoiseInjection",
    "PackageError",
    "PassError",
    "Plan",
    "Planned",
    "Report",
    "Study",
    "Variant",
    "deep_feature_caching",
    "evaluate",
    "explain",
    "export",
    "gate",
    "generate",
    "load",
    "load_miniature",
    "optimize",
    "plan",
    "restore",
    "study",
    "warmup",
]

_MODULES = {
    "api": ("explain", "optimize", "restore", "warmup"),
    "config": ("DECODER", "PARTIAL_ENCODER", "Config", "NoiseInjection", "Planned", "deep_feature_caching"),
    "errors": ("CaptureError", "FdcompileError", "PackageError", "PassError"),
    "package.export": ("export",),
    "package.load": ("load",),
    "miniature": ("load_miniature",),
    "planning.planner": ("plan",),
    "planning.plan": ("Plan",),
    "report": ("Report",),
    "measure.variant": ("Variant",),
    "tools.evaluate.evaluate": ("evaluate",),
    "tools.gate.gate": ("gate",),
    "tools.generate.generate": ("generate",),
    "tools.study.study": ("Study", "study"),
}


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> Any:
    """Imports public names on first access, so that ``fdcompile --help`` need not import torch, which takes seconds."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"fdcompile.{module}"), name)
    raise AttributeError(f"module 'fdcompile' has no attribute {name!r}")
