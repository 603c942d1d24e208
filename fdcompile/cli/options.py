"""Options that several commands take.

Those that are left out are None: their defaults are those of `Config` and of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fdcompile.key_steps import parse_key_steps

Cut = Literal["encoder-propagation", "partial-encoder", "deep-feature-caching"]

MOST_STEPS = 1000
"""As many timesteps as diffusion models are trained on."""

_DIGITS = 30  # of a number that is worth reading

_WHAT, _HOW, _WITH = "What to make", "How to run its UNet", "With what"


def _check_model(model: str | None) -> str | None:
    """Refuses at once what is meant as a folder and is no pipeline; anything else may be an id on the hub."""
    if model is None:
        return None
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise typer.BadParameter(f"{model}: this folder holds no diffusers pipeline (no model_index.json)")
    elif folder.is_absolute() or model.startswith("."):
        raise typer.BadParameter(f"{model}: there is no such folder")
    return model


def _check_finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value}: expected a number")
    return value


def _key_steps(text: str) -> Any:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        if text not in ("paper", "all"):
            raise typer.BadParameter(f"{text!r}: expected paper, all, a stride or steps") from None
        return text
    try:
        return parse_key_steps(numbers if "," in text else numbers[0])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _check_page(path: Path | None) -> Path | None:
    if path is not None and path.suffix.lower() not in (".html", ".htm"):
        raise typer.BadParameter(f"{str(path)!r}: expected the name of a page such as report.html")
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{str(path)!r}: there is no folder {str(path.parent)!r}")
    return path


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """What reads a whole number between `least` and `most`."""
    expected = f"of at least {least}" if most is None else f"from {least} to {most}"

    def read(value: object) -> int:
        text = str(value)  # a default comes as it is
        if not (text.isdecimal() and len(text) <= _DIGITS and least <= int(text) <= (most or int(text))):
            raise typer.BadParameter(f"{text!r}: expected a whole number {expected}")
        return int(text)

    return read


Model = Annotated[
    str | None,
    typer.Option(
        metavar="PATH_OR_ID", callback=_check_model, help="Folder or hub id of a pipeline (default: the miniature)."
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt", metavar="TEXT", help="Repeatable (default: prompts that suit the model).", rich_help_panel=_WHAT
    ),
]
Steps = Annotated[
    int, typer.Option(parser=integer(1, MOST_STEPS), metavar="N", help="Sampling steps.", rich_help_panel=_WHAT)
]
Guidance = Annotated[
    float | None,
    typer.Option(
        metavar="SCALE",
        callback=_check_finite,
        help="Guidance scale (default: the model's own).",
        rich_help_panel=_WHAT,
    ),
]
Side = Annotated[
    int | None,
    typer.Option(
        parser=integer(1), metavar="PIXELS", help="Of a picture (default: the model's own).", rich_help_panel=_WHAT
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        parser=integer(0, 2**63 - 1), metavar="N", help="Of the first picture's noise.", rich_help_panel=_WHAT
    ),
]
KeySteps = Annotated[
    Any,
    typer.Option(
        parser=_key_steps,
        metavar="STEPS",
        help="When the encoder runs: paper, all, a stride, or steps such as 0,1,2,5,10 (default: paper).",
        rich_help_panel=_HOW,
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="What fdcompile plan has written.", rich_help_panel=_HOW),
]
Work = Annotated[
    float,
    typer.Option(metavar="SHARE", help="Most of stock's FLOPs that a plan may use.", rich_help_panel=_HOW),
]
PLANNED_WORK = 0.35
"""About a third."""

Recompute = Annotated[Cut, typer.Option(help="What is computed at every step.", rich_help_panel=_HOW)]
ParallelSteps = Annotated[
    int | None,
    typer.Option(parser=integer(1), metavar="N", help="Most steps decoded in one batch.", rich_help_panel=_WITH),
]
BackendName = Annotated[
    Literal["auto", "eager", "inductor"] | None,
    typer.Option(help="What the stages are lowered with (default: auto).", rich_help_panel=_WITH),
]
ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="FILE", callback=_check_page, help="Page to write, with all of it, to open in a browser."
    ),
]
