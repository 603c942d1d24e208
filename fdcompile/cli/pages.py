"""What the pages of all commands say."""

from __future__ import annotations

import platform
import shlex
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdcompile.cli.comparison import Run
    from fdcompile.measure.report import Page


def show(page: Page, runs: Sequence[Run], rows: dict[str, list[str]], prompts: Sequence[str]) -> None:
    """What runs of the same prompts came to: figures, pictures beside stock, and what ran when."""
    from PIL import Image

    from fdcompile.cli.sheet import AMPLIFICATION, difference
    from fdcompile.measure.timeline import Timeline

    stock, *others = runs
    page.table("Cost and fidelity", ["", *(run.way.name for run in runs)], [[name, *own] for name, own in rows.items()])
    columns = [(run.way.name, run.pictures) for run in runs]
    columns += [(f"{run.way.name}, difference", difference(stock.pictures, run.pictures)) for run in others]
    pictured = [
        (prompt, [Image.fromarray(pictures[row]) for _, pictures in columns]) for row, prompt in enumerate(prompts)
    ]
    note = f"Differences are from the stock picture, amplified {AMPLIFICATION} times."
    page.gallery("Pictures", [name for name, _ in columns], pictured, note)
    timelines = [Timeline.of(run.way.name, run.report) for run in runs if run.report is not None]
    page.timeline("What ran at which step", timelines)


def say_how(page: Page, pipe: Any) -> None:
    """The last section: command, versions, device."""
    import diffusers
    import torch

    import fdcompile

    facts = {
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "device": _device(pipe.device),
        "precision": str(pipe.unet.dtype).removeprefix("torch."),
        "fdcompile": fdcompile.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "Python": platform.python_version(),
    }
    page.made(shlex.join(["fdcompile", *sys.argv[1:]]), facts)


def _device(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"
