"""Title and last section of the reports of all commands."""

from __future__ import annotations

import platform
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdcompile.miniature import is_miniature
from fdcompile.version import versions

if TYPE_CHECKING:
    from fdcompile.measure.report import HtmlReport


def describe(pipe: Any, steps: int, guidance: float | None) -> str:
    """Describes model, sampler, steps and guidance, for a title."""
    name = str(getattr(pipe, "name_or_path", "") or type(pipe).__name__).rstrip("/").rpartition("/")[2]
    model = "the miniature" if is_miniature(pipe) else name
    said = "" if guidance is None else f", guidance {guidance:g}"
    return f"{model}, {type(pipe.scheduler).__name__.removesuffix('Scheduler')}, {steps} steps{said}"


def save(page: HtmlReport, pipe: Any, path: Path) -> None:
    """Adds command, versions and device, and writes the page."""
    facts = {
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "device": _device(pipe.device),
        "precision": str(pipe.unet.dtype).removeprefix("torch."),
        **versions(),
        "Python": platform.python_version(),
    }
    page.made(shlex.join(["fdcompile", *sys.argv[1:]]), facts)
    page.save(path)
    print(f"All of it on one page: {path}")


def _device(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"
