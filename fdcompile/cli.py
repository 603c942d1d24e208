"""The command line: `fdcompile demo` and `fdcompile explain`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fdcompile.config import Config
    from fdcompile.demo import Sampling
    from fdcompile.miniature.scenes import Scene

CUTS = ("encoder-propagation", "partial-encoder", "deep-feature-caching")

_PROMPT = "a photograph of an astronaut riding a horse"
_MINIATURE_PROMPTS = 8


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
    shared = _shared_options()
    demo = commands.add_parser(
        "demo", parents=[shared], help="make the same pictures stock and optimised, and compare them"
    )
    demo.add_argument(
        "--output", type=_picture_file, default=Path("demo.png"), help="picture to write (default: %(default)s)"
    )
    demo.set_defaults(run=_demo)
    explain = commands.add_parser(
        "explain", parents=[shared], help="print the staged program and what one optimised run did"
    )
    explain.set_defaults(run=_explain)
    return parser


def _shared_options() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    what = shared.add_argument_group("what to make")
    what.add_argument(
        "--model", metavar="PATH_OR_ID", help="a pipeline with a UNet, in a folder or on the hub (default: the miniature)"
    )
    what.add_argument("--prompt", action="append", help="may be repeated (default: prompts that suit the model)")
    what.add_argument("--steps", type=_positive, default=50, help="sampling steps (default: %(default)s)")
    what.add_argument("--guidance", type=_finite, help="guidance scale (default: the model's own)")
    what.add_argument("--seed", type=_seed, default=0, help="noise of the first picture (default: %(default)s)")
    how = shared.add_argument_group("how to run it")
    how.add_argument(
        "--key-steps",
        type=_key_steps,
        default="paper",
        metavar="paper|all|STRIDE|STEP,STEP,...",
        help="steps at which the encoder runs, counted from 0 (default: %(default)s)",
    )
    how.add_argument(
        "--fresh", choices=CUTS, help="what is computed at every step, named after the method (default: %(default)s)"
    )
    how.add_argument("--max-parallel-steps", type=_positive, default=8, help="decoded in one batch (default: %(default)s)")
    how.add_argument("--backend", choices=BACKENDS, default="auto", help="(default: %(default)s)")
    return shared
