"""The command line: `fdcompile demo`, `fdcompile explain` and `fdcompile export`."""

from __future__ import annotations

import argparse
import inspect
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdcompile.key_steps import parse_key_steps

if TYPE_CHECKING:
    import torch

    from fdcompile.command.demo import Sampling
    from fdcompile.config import Config
    from fdcompile.miniature.scenes import Scene

CUTS = ("encoder-propagation", "partial-encoder", "deep-feature-caching")

PRECISIONS = ("float32", "float16", "bfloat16")

MINIATURE_SCENES = 8
"""Scenes that the miniature is asked for by default, the first of those it was not trained on."""

DEFAULT_PROMPT = "a photograph of an astronaut riding a horse"


class UserError(Exception):
    """Something the user can put right; the message says what."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own) and returns the exit status: 0, or 2 for bad input."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"fdcompile: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fdcompile", description="Runs the UNet of a diffusers pipeline with its encoder at key steps only."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = [_model_options(), _sampling_options(), _program_options(), _execution_options()]
    demo = commands.add_parser(
        "demo", parents=shared, help="make the same pictures stock and optimised, and compare them"
    )
    demo.add_argument(
        "--output",
        type=_picture_file,
        default=Path("demo.png"),
        metavar="FILE",
        help="picture to write (default: %(default)s)",
    )
    demo.set_defaults(run=_demo)
    explain = commands.add_parser(
        "explain", parents=shared, help="print the staged program and what one optimised run did"
    )
    explain.set_defaults(run=_explain)
    export = commands.add_parser(
        "export",
        parents=[_model_options(), _program_options()],
        help="write the UNet's stages to a directory that fdcompile.load runs",
    )
    export.add_argument("directory", type=Path, metavar="DIRECTORY", help="to make")
    export.add_argument(
        "--format",
        required=True,
        type=_format,
        metavar="NAME",
        help="what the stages are compiled to: aot_inductor, onnx, tensorrt or tensorrt_onnx",
    )
    for name in ("height", "width"):
        export.add_argument(
            f"--{name}", type=_positive, metavar="PIXELS", help="of a picture (default: the model's own)"
        )
    for name, what in (("batch", "pictures at once"), ("parallel-steps", "steps decoded at once")):
        export.add_argument(f"--{name}", type=_range, metavar="MIN,OPT,MAX", help=f"{what}; or one number")
    export.add_argument("--precision", choices=PRECISIONS, help="to load the model in (default: float16 on CUDA)")
    export.set_defaults(run=_export)
    return parser


def _model_options() -> argparse.ArgumentParser:
    """Options that are left out stay None, here and below: the defaults are those of `Config` and of the model."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--model", metavar="PATH_OR_ID", help="folder or hub id of a pipeline (default: the miniature)"
    )
    return options


def _sampling_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    what = options.add_argument_group("what to make")
    what.add_argument(
        "--prompt", action="append", metavar="TEXT", help="repeatable (default: prompts that suit the model)"
    )
    what.add_argument("--steps", type=_positive, default=50, metavar="N", help="sampling steps (default: %(default)s)")
    what.add_argument("--guidance", type=_finite, metavar="SCALE", help="guidance scale (default: the model's own)")
    what.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of the first picture's noise (default: %(default)s)"
    )
    return options


def _program_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    how = options.add_argument_group("how to run its UNet")
    how.add_argument(
        "--key-steps",
        type=_key_steps,
        metavar="STEPS",
        help="when the encoder runs: paper, all, a stride, or steps such as 0,1,2,5,10 (default: paper)",
    )
    how.add_argument("--fresh", choices=CUTS, help=f"what is computed at every step (default: {CUTS[0]})")
    return options


def _execution_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    how = options.add_argument_group("with what")
    how.add_argument("--max-parallel-steps", type=_positive, metavar="N", help="most steps decoded in one batch")
    how.add_argument(
        "--backend", type=_backend, metavar="NAME", help="what the stages are lowered with: auto, eager or inductor"
    )
    return options


def _positive(text: str) -> int:
    return _integer(text, 1)


def _seed(text: str) -> int:
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least {least}")
    return int(text)


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number")
    return value


def _key_steps(text: str) -> str | int | tuple[int, ...]:
    choice: str | int | tuple[int, ...] = text
    try:
        if text not in ("paper", "all"):
            numbers = tuple(int(part) for part in text.split(","))
            choice = numbers if "," in text else numbers[0]
        parse_key_steps(choice)
    except ValueError as error:
        reason = error if isinstance(choice, int | tuple) else f"{text!r}: expected paper, all, a stride or steps"
        raise argparse.ArgumentTypeError(str(reason)) from error
    return choice


def _range(text: str) -> int | tuple[int, ...]:
    from fdcompile.backends.stored import Range

    try:
        numbers = tuple(int(part) for part in text.split(","))
        value = numbers if len(numbers) > 1 else numbers[0]
        Range.parse("range", value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number, or smallest,usual,largest") from error
    return value


def _backend(text: str) -> str:
    from fdcompile.backends import check_backend

    try:
        check_backend(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _format(text: str) -> str:
    from fdcompile.backends import package_format

    try:
        package_format(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _picture_file(text: str) -> Path:
    from PIL import Image

    path = Path(text)
    if path.suffix.lower() not in Image.registered_extensions():
        raise argparse.ArgumentTypeError(f"{text!r}: expected the name of a picture file such as demo.png")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {str(path.parent)!r}")
    return path


def _demo(arguments: argparse.Namespace) -> None:
    from fdcompile.command.demo import MAX_PROMPTS, compare, sheet, table

    if len(arguments.prompt or ()) > MAX_PROMPTS:
        raise UserError(f"{len(arguments.prompt)} prompts: one picture holds at most {MAX_PROMPTS}")
    pipe, config, sampling = _prepare(arguments)
    print(f"{_headline(pipe, config, sampling)}\n", flush=True)
    comparison = compare(pipe, config, sampling)
    print(table(comparison, _scenes(sampling.prompts) if arguments.model is None else None))
    sheet(comparison).save(arguments.output)
    print(f"\nstock, optimised and their difference: {arguments.output}")


def _explain(arguments: argparse.Namespace) -> None:
    from fdcompile.api import explain, optimize
    from fdcompile.command.demo import sample

    pipe, config, sampling = _prepare(arguments)
    sample(optimize(pipe, config), sampling)
    report = explain(pipe)
    print(*report.programs, _headline(pipe, config, sampling), report, sep="\n\n")


def _export(arguments: argparse.Namespace) -> None:
    import torch

    from fdcompile.api import optimize
    from fdcompile.package.export import export

    dtype = None if arguments.precision is None else getattr(torch, arguments.precision)
    pipe = _load(arguments.model, dtype)
    names = ("height", "width", "batch", "parallel_steps")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    try:
        optimize(pipe, _config(arguments, pipe))
        folder = export(pipe, arguments.directory, format=arguments.format, precision=dtype, progress=_tell, **given)
    except (TypeError, ValueError, OSError, ImportError) as error:
        raise UserError(str(error)) from error
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 2**20:.1f} MiB; run it with fdcompile.load(pipe, {str(folder)!r})")


def _tell(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def _prepare(arguments: argparse.Namespace) -> tuple[Any, Config, Sampling]:
    """The stock pipeline and what the command line asks of it, checked before any work."""
    from fdcompile.api import optimize, restore
    from fdcompile.command.demo import MINIATURE_GUIDANCE, Sampling

    pipe = _load(arguments.model)
    try:
        config = _config(arguments, pipe)
        restore(optimize(pipe, config))
        pipe.scheduler.set_timesteps(arguments.steps)
        config.key_steps_of(pipe.scheduler.timesteps.tolist())
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise UserError(f"{type(pipe).__name__} takes no prompt")
    guidance = arguments.guidance
    if arguments.model is None and guidance is None:
        guidance = MINIATURE_GUIDANCE
    return pipe, config, Sampling(_prompts(arguments), arguments.steps, guidance, arguments.seed)


def _load(model: str | None, dtype: torch.dtype | None = None) -> Any:
    if model is not None:
        _check_folder(model)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import reports on image processors nobody asked for
    import diffusers
    import torch
    import transformers

    from fdcompile.miniature import load_miniature

    for library in (diffusers, transformers):
        library.logging.disable_progress_bar()
    name = model or "the miniature"
    _tell(f"loading {name}")
    cuda = torch.cuda.is_available()
    try:
        if model is None:
            pipe = load_miniature(dtype)
        else:
            dtype = dtype or (torch.float16 if cuda else torch.float32)
            pipe = diffusers.DiffusionPipeline.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {name}: {error}") from error
    pipe.set_progress_bar_config(leave=False, disable=None)  # only on a terminal
    return pipe.to("cuda" if cuda else "cpu")


def _check_folder(model: str) -> None:
    """Refuses at once what is meant as a folder and is no pipeline; anything else may be an id on the hub."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(f"--model {model}: this folder holds no diffusers pipeline (no model_index.json)")
    elif folder.is_absolute() or model.startswith("."):
        raise UserError(f"--model {model}: there is no such folder")


def _config(arguments: argparse.Namespace, pipe: Any) -> Config:
    from fdcompile.config import DECODER, PARTIAL_ENCODER, Config, deep_feature_caching

    levels = len(getattr(getattr(pipe, "unet", None), "up_blocks", ()))
    cuts = dict(zip(CUTS, (DECODER, PARTIAL_ENCODER, deep_feature_caching(levels)), strict=True))
    chosen = {name: getattr(arguments, name, None) for name in ("key_steps", "max_parallel_steps", "backend")}
    given = {name: value for name, value in chosen.items() if value is not None}
    return Config(fresh=cuts[arguments.fresh or CUTS[0]], **given)


def _prompts(arguments: argparse.Namespace) -> tuple[str, ...]:
    from fdcompile.miniature.scenes import evaluation_scenes

    if arguments.prompt:
        return tuple(arguments.prompt)
    if arguments.model is not None:
        return (DEFAULT_PROMPT,)
    return tuple(scene.caption for scene in evaluation_scenes(MINIATURE_SCENES))


def _scenes(prompts: tuple[str, ...]) -> list[Scene] | None:
    """What the miniature's pictures must show, or None if a prompt is not a caption of its grammar."""
    from fdcompile.miniature.scenes import parse_caption

    try:
        return [parse_caption(prompt) for prompt in prompts]
    except ValueError:
        return None


def _headline(pipe: Any, config: Config, sampling: Sampling) -> str:
    count = len(sampling.prompts)
    key_steps = config.key_steps_of(pipe.scheduler.timesteps.tolist())
    return (
        f"{type(pipe).__name__}, {type(pipe.scheduler).__name__}, {sampling.steps} steps, "
        f"{count} {'picture' if count == 1 else 'pictures'}, seed {sampling.seed}\n"
        f"key steps {' '.join(map(str, key_steps))}; fresh: {', '.join(config.fresh)}"
    )
