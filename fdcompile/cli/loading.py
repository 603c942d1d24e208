"""The pipeline that a command works on, and the configuration for it."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fdcompile
from fdcompile.cli.errors import UserError, blame_user

if TYPE_CHECKING:
    import torch

    from fdcompile.cli.options import Cut
    from fdcompile.config import Config
    from fdcompile.planning.plan import Plan, Point


def load_pipe(model: str | None, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Any:
    """The pipeline called `model`, by default the miniature, on `device` or where it runs best.

    Raises:
        UserError: it cannot be loaded.
    """
    name = model or "the miniature"
    tell(f"loading {name}")
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    try:
        if model is None:
            pipe: Any = fdcompile.load_miniature(dtype)
        else:
            dtype = dtype or (torch.float16 if cuda else torch.float32)
            pipe = diffusers.DiffusionPipeline.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {name}: {error}") from error
    pipe.set_progress_bar_config(leave=False, disable=None)  # only on a terminal
    return pipe.to(device or ("cuda" if cuda else "cpu"))


def make_config(pipe: Any, recompute: Cut, **options: Any) -> Config:
    """The configuration with the cut that is named `recompute`; options that are None have their defaults."""
    levels = len(getattr(getattr(pipe, "unet", None), "up_blocks", ()))
    cuts = {
        "encoder-propagation": fdcompile.DECODER,
        "partial-encoder": fdcompile.PARTIAL_ENCODER,
        "deep-feature-caching": fdcompile.deep_feature_caching(levels),
    }
    given = {name: value for name, value in options.items() if value is not None}
    return fdcompile.Config(recompute=cuts[recompute], **given)


def read_plan(path: Path, pipe: Any, work: float, steps: int | None = None) -> tuple[Plan, Point]:
    """A plan that was made for `pipe`, and what it has for `work`; for a schedule of `steps` steps, if that is known.

    Raises:
        UserError: it cannot be read, is for something else, or has nothing for so little work.
    """
    with blame_user(ValueError, OSError):
        plan = fdcompile.Plan.load(path)
        plan.check(pipe)
        point = plan.point(work=work)
    if steps is not None:
        pipe.scheduler.set_timesteps(steps)
        if plan.configured(point).plan_for(pipe.scheduler.timesteps.tolist()) is None:
            raise UserError(f"{path} is for {len(plan.timesteps)} steps, and not for those of --steps {steps}")
    return plan, point


def check_plan_alone(plan: Path | None, key_steps: Any) -> None:
    """Refuses key steps beside those of a plan.

    Raises:
        UserError: both are given.
    """
    if plan is not None and key_steps is not None:
        raise UserError("--plan has key steps of its own: leave --key-steps out")


def choose_config(
    pipe: Any, recompute: Cut, plan: Path | None, work: float, steps: int | None = None, **options: Any
) -> Config:
    """As `make_config`, and with a plan what it has for `work` in place of the key steps and the cut.

    Raises:
        UserError: as `read_plan`.
    """
    config = make_config(pipe, recompute, **options)
    if plan is None:
        return config
    found, point = read_plan(plan, pipe, work, steps)
    return replace(found.configured(point), max_parallel_steps=config.max_parallel_steps, backend=config.backend)


def check_takes_prompt(pipe: Any) -> None:
    """Refuses a pipeline that cannot be asked in words.

    Raises:
        UserError: its call has no prompt.
    """
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise UserError(f"{type(pipe).__name__} takes no prompt")


def tell(line: str) -> None:
    """Says on stderr what is being done."""
    print(f"  {line}", file=sys.stderr, flush=True)
