"""What a command measures a pipeline with: prompts out of a file, a sampler, and a bar that shows how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fdcompile.cli.errors import UserError, blame_user
from fdcompile.cli.loading import load_pipe

if TYPE_CHECKING:
    import torch


def _read(path: Path | None) -> Path | None:
    if path is not None and len(_lines(path)) < 2:
        raise typer.BadParameter(f"{str(path)!r}: expected at least 2 prompts, one a line")
    return path


def _lines(path: Path) -> list[str]:
    with blame_user(OSError, UnicodeDecodeError):
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", callback=_read, help="One prompt a line (default: the miniature's)."),
]
Scheduler = Annotated[str | None, typer.Option(metavar="CLASS", help="Of diffusers (default: the model's own).")]


def check_drawable() -> None:
    """Refuses what is to be drawn where nothing can draw it.

    Raises:
        BadParameter: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise typer.BadParameter("plots are drawn by matplotlib, which is missing: pip install 'fdcompile[evaluate]'")


def asked_calls(
    model: str | None, prompts: Path | None, captions: Sequence[str], steps: int, guidance: float | None
) -> tuple[list[str], dict[str, Any]]:
    """Prompts, of the miniature `captions` by default, and the arguments of every call.

    Raises:
        UserError: there are no prompts for a model other than the miniature.
    """
    from fdcompile.cli.sampling import MINIATURE_GUIDANCE

    if model is not None and prompts is None:
        raise UserError("--prompts is missing: what the model will be asked for")
    if model is None and guidance is None:
        guidance = MINIATURE_GUIDANCE
    common: dict[str, Any] = {"num_inference_steps": steps}
    common |= {} if guidance is None else {"guidance_scale": guidance}
    return _lines(prompts) if prompts else list(captions), common


def load_with(model: str | None, scheduler: str | None, device: torch.device | None = None) -> Any:
    """The pipeline called `model` with the scheduler of the class `scheduler`, on `device` or where it runs best.

    Raises:
        UserError: it cannot be loaded, or diffusers has no such class.
    """
    import diffusers

    kind: Any = getattr(diffusers, scheduler, None) if scheduler is not None else None
    if scheduler is not None and (not hasattr(kind, "from_config") or not scheduler.endswith("Scheduler")):
        raise UserError(f"--scheduler {scheduler}: diffusers has none of that name, expected one like DDIMScheduler")
    pipe = load_pipe(model, device=device)
    if scheduler is not None:
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return pipe


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """On stderr, with what is being done."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, done: bar.update(task, description=what, completed=done)
