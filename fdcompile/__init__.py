"""fdcompile: a compiler that runs a diffusion UNet's work when its inputs are known, not when they are used."""

from fdcompile.api import explain, optimize, restore
from fdcompile.capture import CaptureError
from fdcompile.config import DECODER, PARTIAL_ENCODER, Config, NoiseInjection, deep_feature_caching
from fdcompile.miniature import load_miniature
from fdcompile.passes import PassError
from fdcompile.report import Report

__version__ = "0.1.0"

__all__ = [
    "DECODER",
    "PARTIAL_ENCODER",
    "CaptureError",
    "Config",
    "NoiseInjection",
    "PassError",
    "Report",
    "deep_feature_caching",
    "explain",
    "load_miniature",
    "optimize",
    "restore",
]
