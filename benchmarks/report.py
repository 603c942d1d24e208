"""Helpers for the results that benchmarks write."""

from __future__ import annotations

import math
import platform
import subprocess
from pathlib import Path
from typing import Any

import diffusers
import torch


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """Replaces infinity, the PSNR of identical images, by the string "inf", because JSON has none."""
    return {name: "inf" if value == math.inf else value for name, value in row.items()}


def about() -> dict[str, str]:
    """Describes the device, the versions and the commit."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": commit or "unknown",
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"
