"""``fdcompile demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fdcompile.command.options import BackendName, Fresh, Guidance, KeySteps, Model, ParallelSteps, Prompts, Seed, Steps

if TYPE_CHECKING:
    from PIL import Image

    from fdcompile.miniature.scenes import Scene


def _check_picture(path: Path) -> Path:
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise typer.BadParameter(f"{str(path)!r}: expected the name of a picture file such as demo.png")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{str(path)!r}: there is no folder {str(path.parent)!r}")
    return path


def demo(
    model: Model = None,
    prompts: Prompts = None,
    steps: Steps = 50,
    guidance: Guidance = None,
    seed: Seed = 0,
    key_steps: KeySteps = None,
    fresh: Fresh = "encoder-propagation",
    max_parallel_steps: ParallelSteps = None,
    backend: BackendName = None,
    output: Annotated[Path, typer.Option(metavar="FILE", callback=_check_picture, help="Picture to write.")] = Path(
        "demo.png"
    ),
) -> None:
    """Make the same pictures stock and optimised, and compare them."""
    from rich.console import Console

    from fdcompile.command.comparison import compare, table
    from fdcompile.command.sampling import ask, headline, prepare
    from fdcompile.command.sheet import sheet

    sampling = ask(model, prompts, steps, guidance, seed)
    options = {"key_steps": key_steps, "max_parallel_steps": max_parallel_steps, "backend": backend}
    pipe, config = prepare(model, sampling, fresh, **options)
    print(headline(pipe, config, sampling), flush=True)
    comparison = compare(pipe, config, sampling)
    Console().print(table(comparison, _scenes(sampling.prompts) if model is None else None))
    save(sheet(comparison), output)
    print(f"stock, optimised and their difference: {output}")


def _scenes(prompts: tuple[str, ...]) -> list[Scene] | None:
    """What the miniature's pictures must show, or None if a prompt is not a caption of its grammar."""
    from fdcompile.miniature.scenes import parse_caption

    try:
        return [parse_caption(prompt) for prompt in prompts]
    except ValueError:
        return None


def save(picture: Image.Image, path: Path) -> None:
    """Writes `picture` to `path`, all of it or nothing."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        picture.save(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
