"""Sections that the reports of all commands share."""

from __future__ import annotations

import platform
import shlex
import sys
from typing import TYPE_CHECKING, Any

from fdcompile.miniature import is_miniature
from fdcompile.version import versions

if TYPE_CHECKING:
    from fdcompile.measure.report import HtmlReport


def describe(pipe: Any, steps: int, guidance: float | None) -> str:
    """Model, sampler and guidance, for a title."""
    name = str(getattr(pipe, "name_or_path", "") or type(pipe).__name__).rstrip("/").rpartition("/")[2]
    model = "the miniature" if is_miniature(pipe) else name
    said = "" if guidance is None else f", guidance {guidance:g}"
    return f"{model}, {type(pipe.scheduler).__name__.removesuffix('Scheduler')}, {steps} steps{said}"


def how_it_was_made(page: HtmlReport, pipe: Any) -> None:
    """The last section: command, versions, device."""
    facts = {
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "device": _device(pipe.device),
        "precision": str(pipe.unet.dtype).removeprefix("torch."),
        **versions(),
        "Python": platform.python_version(),
    }
    page.made(shlex.join(["fdcompile", *sys.argv[1:]]), facts)


def _device(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"
