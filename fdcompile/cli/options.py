"""Options that several commands take, in groups.

A command takes a group as one parameter, which `grouped` replaces by the group's options. Options that are not given
are None, and take the defaults of `Config` and of the model.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from fdcompile.io import check_folder, check_target
from fdcompile.key_steps import PRESETS, parse_key_steps

Command = TypeVar("Command", bound=Callable[..., Any])

Cut = Literal["encoder-propagation", "partial-encoder", "deep-feature-caching", "output"]

MOST_STEPS = 1000
"""Number of timesteps that diffusion models are trained with."""

_DIGITS = 30  # longer numbers are rejected unread

CHECKPOINTS = (".safetensors", ".ckpt")
"""Suffixes of files with a whole pipeline."""

_WHAT, _HOW, _WITH = "Images", "Key steps and plan", "Execution"


def _check_model(model: str | None) -> str | None:
    """Rejects paths that are not pipelines. Other names may be ids on the hub."""
    if model is None:
        return None
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise typer.BadParameter(f"{model}: this folder holds no diffusers pipeline (no model_index.json)")
    elif folder.suffix in CHECKPOINTS:
        if not folder.is_file():
            raise typer.BadParameter(f"{model}: there is no such file")
    elif folder.is_absolute() or model.startswith("."):
        raise typer.BadParameter(f"{model}: there is no such folder")
    return model


def _check_lora(lora: str | None) -> str | None:
    """Rejects paths that do not exist. Other names may be ids on the hub."""
    if lora is None or Path(lora).exists():
        return lora
    path = Path(lora)
    if path.is_absolute() or lora.startswith(".") or len(path.parts) > 2 or path.suffix in CHECKPOINTS:
        raise typer.BadParameter(f"{lora}: there is no such file or folder")
    return lora


def _check_finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value}: expected a number")
    return value


def _key_steps(text: str) -> Any:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        if text not in PRESETS:
            raise typer.BadParameter(f"{text!r}: expected {', '.join(PRESETS)}, a stride or steps") from None
        return text
    try:
        return parse_key_steps(numbers if "," in text else numbers[0])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """Returns a parser of whole numbers from `least` to `most`."""
    expected = f"of at least {least}" if most is None else f"from {least} to {most}"

    def read(value: object) -> int:
        text = str(value)  # defaults are not strings
        if not (text.isdecimal() and len(text) <= _DIGITS and least <= int(text) <= (most or int(text))):
            raise typer.BadParameter(f"{text!r}: expected a whole number {expected}")
        return int(text)

    return read


def output_file(*suffixes: str) -> Callable[[Path | None], Path | None]:
    """Returns a callback that rejects files that cannot be written, before any work."""

    def check(path: Path | None) -> Path | None:
        if path is None:
            return None
        if suffixes and path.suffix.lower() not in suffixes:
            raise typer.BadParameter(f"{str(path)!r}: expected the name of a file such as report{suffixes[0]}")
        try:
            check_target(path)
        except OSError as error:
            raise typer.BadParameter(str(error)) from error
        return path

    return check


def output_folder(path: Path) -> Path:
    """Rejects a folder that cannot be created or written to."""
    try:
        check_folder(path)
    except OSError as error:
        raise typer.BadParameter(str(error)) from error
    return path


def drawn_file(*suffixes: str) -> Callable[[Path | None], Path | None]:
    """Like `output_file`, for a plot, which needs matplotlib."""
    check = output_file(*suffixes)

    def check_drawn(path: Path | None) -> Path | None:
        if path is not None:
            check_drawable()
        return check(path)

    return check_drawn


def check_drawable() -> None:
    """Rejects plots if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise typer.BadParameter("plots need matplotlib, which is not installed: pip install 'fdcompile[evaluate]'")


def _check_prompts(path: Path | None) -> Path | None:
    if path is not None and len(read_lines(path)) < 2:
        raise typer.BadParameter(f"{str(path)!r}: expected at least 2 prompts, one a line")
    return path


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a file that are not empty."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{str(path)!r}: {error}") from error


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
        parser=integer(1),
        metavar="PIXELS",
        help="Size of the images (default: the model's own).",
        rich_help_panel=_WHAT,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        parser=integer(0, 2**63 - 1), metavar="N", help="Seed of the first image's noise.", rich_help_panel=_WHAT
    ),
]
Batch = Annotated[int, typer.Option(parser=integer(1), metavar="N", help="Images per call in each process.")]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts", metavar="FILE", callback=_check_prompts, help="One prompt per line (default: the miniature's)."
    ),
]
Work = Annotated[
    float, typer.Option(metavar="SHARE", help="Largest share of stock's FLOPs for plans.", rich_help_panel=_HOW)
]
PLANNED_WORK = 0.35
"""Default share of stock's FLOPs for plans."""


def _report(check: Callable[..., Path | None]) -> Any:
    text = "HTML page to write with all results."
    return typer.Option("--report", metavar="FILE", callback=check, help=text)


ReportFile = Annotated[Path | None, _report(output_file(".html", ".htm"))]
PlottedReportFile = Annotated[Path | None, _report(drawn_file(".html", ".htm"))]


@dataclass(frozen=True)
class ModelOptions:
    """Options for loading a pipeline."""

    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_ID",
            callback=_check_model,
            help="Folder, hub id or checkpoint (.safetensors) of a pipeline (default: the miniature).",
        ),
    ] = None
    scheduler: Annotated[
        str | None, typer.Option(metavar="CLASS", help="Scheduler class of diffusers (default: the model's own).")
    ] = None
    lora: Annotated[
        str | None, typer.Option(metavar="PATH_OR_ID", callback=_check_lora, help="LoRA weights to load.")
    ] = None
    variant: Annotated[str | None, typer.Option(metavar="NAME", help="Variant of the weight files, such as fp16.")] = (
        None
    )
    precision: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Precision of the model (default: float16 on CUDA, else float32)."),
    ] = None


@dataclass(frozen=True)
class SamplingOptions:
    """Options for one call of the pipeline."""

    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="Prompt; repeatable (default: prompts that suit the model).",
            rich_help_panel=_WHAT,
        ),
    ] = None
    steps: Steps = 50
    guidance: Guidance = None
    seed: Seed = 0


@dataclass(frozen=True)
class KeyStepOptions:
    """Options for key steps, cut and plan."""

    key_steps: Annotated[
        Any,
        typer.Option(
            parser=_key_steps,
            metavar="STEPS",
            help="Key steps: auto, paper, all, a stride, or steps such as 0,1,2,5,10 (default: auto).",
            rich_help_panel=_HOW,
        ),
    ] = None
    recompute: Annotated[
        Cut | None,
        typer.Option(
            help="Cut: what to compute at every step; output: nothing (default with auto, else encoder-propagation).",
            rich_help_panel=_HOW,
        ),
    ] = None
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Plan written by fdcompile plan.", rich_help_panel=_HOW),
    ] = None
    work: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help=f"Share of steps that are key steps (default: 0.5); with a plan, largest share of stock's FLOPs "
            f"(default: {PLANNED_WORK}).",
            rich_help_panel=_HOW,
        ),
    ] = None
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Refuse a plan for other weights, scheduler, schedule or guidance.", rich_help_panel=_HOW
        ),
    ] = False


@dataclass(frozen=True)
class RunOptions(KeyStepOptions):
    """`KeyStepOptions` with the options for running."""

    max_parallel_steps: Annotated[
        int | None,
        typer.Option(
            parser=integer(1), metavar="N", help="Largest number of steps decoded in one batch.", rich_help_panel=_WITH
        ),
    ] = None
    backend: Annotated[
        Literal["auto", "eager", "inductor"] | None,
        typer.Option(help="Backend that compiles the stages (default: auto).", rich_help_panel=_WITH),
    ] = None


def grouped(command: Command) -> Command:
    """Replaces each parameter of `command` that is a group of options by the options in the group."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            annotated = parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            parameters.append(annotated)
            continue
        fields = get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(
                option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=fields[option.name]
            )
            for option in dataclasses.fields(groups[name])
        ]

    @functools.wraps(command)
    def run(**values: Any) -> Any:
        given = {
            name: kind(**{option.name: values.pop(option.name) for option in dataclasses.fields(kind)})
            for name, kind in groups.items()
        }
        return command(**given, **values)

    del run.__wrapped__  # which has another signature
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run  # type: ignore[return-value]
