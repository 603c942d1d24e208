"""``fdcompile plan``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

import fdcompile
from fdcompile.command.errors import UserError, blame_user
from fdcompile.command.loading import load_pipe
from fdcompile.command.options import MOST_STEPS, Guidance, Model, Steps, whole

MINIATURE_PROMPTS = 16
"""As many captions of its grammar the miniature is planned with by default."""


def _check_folder(path: Path | None) -> Path | None:
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"{str(path)!r}: there is no folder {str(path.parent)!r}")
    return path


def _check_plot(path: Path | None) -> Path | None:
    if path is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("a plot is drawn by matplotlib, which is not installed: pip install matplotlib")
    return _check_folder(path)


def _read_prompts(path: Path | None) -> Path | None:
    if path is not None and len(_lines(path)) < 2:
        raise typer.BadParameter(f"{str(path)!r}: expected at least 2 prompts, one a line")
    return path


def _lines(path: Path) -> list[str]:
    with blame_user(OSError, UnicodeDecodeError):
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def plan(
    output: Annotated[Path, typer.Option(metavar="FILE", callback=_check_folder, help="Plan to write, as JSON.")],
    model: Model = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", callback=_read_prompts, help="Prompts to plan with, one a line (default: the miniature's)."
        ),
    ] = None,
    steps: Steps = 50,
    guidance: Guidance = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="CLASS", help="Of diffusers (default: the model's own).")
    ] = None,
    converged: Annotated[
        int | None,
        typer.Option(parser=whole(1, MOST_STEPS), metavar="N", help="Compare with stock runs of so many steps, too."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=_check_plot, help="Picture to draw: work against PSNR.")
    ] = None,
) -> None:
    """Measure where to recompute and how to forecast between, and write it down."""
    from fdcompile.command.sampling import MINIATURE_GUIDANCE
    from fdcompile.miniature.scenes import planning_scenes

    if model is not None and prompts is None:
        raise UserError("--prompts is missing: a plan is made with what the model will be asked for")
    if model is None and guidance is None:
        guidance = MINIATURE_GUIDANCE
    calls = _lines(prompts) if prompts else [scene.caption for scene in planning_scenes(MINIATURE_PROMPTS)]
    pipe = load_pipe(model)
    if scheduler is not None:
        pipe.scheduler = _scheduler(scheduler, pipe)
    common: dict[str, Any] = {"num_inference_steps": steps}
    common |= {} if guidance is None else {"guidance_scale": guidance}
    with blame_user(TypeError, ValueError, fdcompile.CaptureError), _progress_bar() as progress:
        found = fdcompile.plan(pipe, calls, converged=converged, progress=progress, **common)
    found.save(output)
    if plot is not None:
        found.plot(plot)
    print(f"{found}\n\n{output}: give fdcompile.optimize one of its configs, or a command --plan {output}")


def _scheduler(name: str, pipe: Any) -> Any:
    import diffusers

    kind: Any = getattr(diffusers, name, None)
    if not hasattr(kind, "from_config") or not name.endswith("Scheduler"):
        raise UserError(f"--scheduler {name}: diffusers has none of that name, expected one like DDIMScheduler")
    return kind.from_config(pipe.scheduler.config)


@contextmanager
def _progress_bar() -> Iterator[Callable[[str, float], None]]:
    """On stderr, with what is being done."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, done: bar.update(task, description=what, completed=done)
