"""Makes the configuration of a command from its options."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fdcompile
from fdcompile.cli import loading
from fdcompile.cli.errors import UserError, blame_user
from fdcompile.cli.options import PLANNED_WORK, Cut, KeyStepOptions, ModelOptions, RunOptions
from fdcompile.cli.sampling import Sampling, check_takes_prompt
from fdcompile.pipeline.check import number_of_levels

if TYPE_CHECKING:
    from fdcompile.config import Config
    from fdcompile.planning.plan import Plan, Point


def make_config(pipe: Any, choosing: KeyStepOptions, steps: int | None = None, guidance: float | None = None) -> Config:
    """Makes the configuration of these options. A plan replaces key steps, cut and forecast.

    Options that are None have their defaults.

    Raises:
        UserError: an option is invalid, or the plan is not for `pipe`, `steps` and `guidance`.
    """
    cuts: dict[Cut | None, tuple[str, ...] | None] = {
        None: None,
        "output": (),
        "encoder-propagation": fdcompile.DECODER,
        "partial-encoder": fdcompile.PARTIAL_ENCODER,
        "deep-feature-caching": fdcompile.deep_feature_caching(number_of_levels(pipe)),
    }
    options: dict[str, Any] = {"recompute": cuts[choosing.recompute], "key_steps": choosing.key_steps}
    if choosing.plan is None:
        options["work"] = choosing.work
    if isinstance(choosing, RunOptions):
        options |= {"max_parallel_steps": choosing.max_parallel_steps, "backend": choosing.backend}
    with blame_user(ValueError):
        config = fdcompile.Config(**{name: value for name, value in options.items() if value is not None})
    if choosing.plan is None:
        return config
    work = choosing.work or PLANNED_WORK
    plan, point = read_plan(choosing.plan, pipe, work, steps, guidance, strict=choosing.strict)
    return replace(
        plan.configured(point),
        max_parallel_steps=config.max_parallel_steps,
        backend=config.backend,
        strict=choosing.strict,
    )


def check_choice(choosing: KeyStepOptions, steps: int | None = None) -> None:
    """Checks that the options do not contradict each other, before anything is loaded.

    Raises:
        UserError: key steps are given in addition to a plan's, or are not among `steps`; or the plan cannot be read.
    """
    key_steps = choosing.key_steps
    if choosing.plan is not None:
        if key_steps is not None:
            raise UserError("--plan has key steps of its own: leave --key-steps out")
        with blame_user(ValueError, OSError):
            fdcompile.Plan.load(choosing.plan)
    if steps is not None and isinstance(key_steps, tuple) and key_steps[-1] >= steps:
        raise UserError(
            f"key_steps={list(key_steps)}: step {key_steps[-1]} is out of range, {steps} steps are 0 to {steps - 1}"
        )


def read_plan(
    path: Path,
    pipe: Any,
    work: float,
    steps: int | None = None,
    guidance: float | None = None,
    *,
    strict: bool = False,
) -> tuple[Plan, Point]:
    """Reads a plan and returns it with its point for `work`.

    Raises:
        UserError: the plan cannot be read or has no point for `work`; or, if `strict`, was made for another pipeline, a
            schedule other than that of `steps` steps, or another guidance scale.
    """
    from fdcompile.pipeline.plans import check_made_for  # loads diffusers
    from fdcompile.runtime.forecast import key_steps_of  # loads diffusers

    with blame_user(ValueError, OSError):
        plan = fdcompile.Plan.load(path)
        point = plan.point(work=work)
        if strict:
            config = replace(plan.configured(point), strict=True)
            check_made_for(config, pipe)
            if steps is not None:
                pipe.scheduler.set_timesteps(steps)
                if guidance is None and "guidance_scale" in (usual := inspect.signature(pipe.__call__).parameters):
                    guidance = usual["guidance_scale"].default
                key_steps_of(config, pipe.scheduler, guidance)
    return plan, point


def prepare(model: ModelOptions, sampling: Sampling, choosing: KeyStepOptions) -> tuple[Any, Config]:
    """Loads a stock pipeline, and makes the configuration of these options; checks them with `sampling`.

    Raises:
        UserError: the model cannot be loaded or optimized, or the call is invalid.
    """
    check_choice(choosing, sampling.steps)
    pipe = loading.load_pipe(model)
    check_takes_prompt(pipe)
    with blame_user(TypeError, ValueError):
        config = make_config(pipe, choosing, sampling.steps, sampling.guidance)
        fdcompile.restore(fdcompile.optimize(pipe, config))
        pipe.scheduler.set_timesteps(sampling.steps)
    return pipe, config
