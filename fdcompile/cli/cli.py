"""The command line: one file for each command; `options` has the options that several share."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from fdcompile.cli.demo import demo
from fdcompile.cli.evaluate import evaluate
from fdcompile.cli.explain import explain
from fdcompile.cli.export import export
from fdcompile.cli.gate import gate
from fdcompile.cli.generate import generate
from fdcompile.cli.plan import plan
from fdcompile.cli.study import study
from fdcompile.version import __version__

INTERRUPTED = 130

app = typer.Typer(
    help="Run the UNet of a diffusers pipeline, or its encoder, at key steps only.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (demo, explain, study, plan, evaluate, gate, export, generate):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fdcompile {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """One line, like other messages on stderr; warnings for developers name their source line."""
    place = "" if category is UserWarning else f" ({category.__name__}, {filename}:{lineno})"
    return f"  warning: {message}{place}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own).

    Returns:
        The exit status: 0; 1 if a command reports a failure; 2 for invalid input or 130 after Ctrl-C, with a message in
        one line.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import warns about unrelated image processors
    formatted, warnings.formatwarning = warnings.formatwarning, _format_warning
    try:
        status = app(argv, prog_name="fdcompile", standalone_mode=False) or 0
    except typer.TyperException as error:
        message = " ".join(error.format_message().split()).replace("Value error, ", "")  # typer's prefix
        if message:  # empty without a command, which prints the help
            print(f"fdcompile: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        status = INTERRUPTED
    finally:
        warnings.formatwarning = formatted
    if status == INTERRUPTED:
        print("fdcompile: interrupted", file=sys.stderr)
    return status
