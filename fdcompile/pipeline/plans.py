"""Configurations from the arguments of users, and whether their plans were made for this pipeline."""

from __future__ import annotations

import os
from typing import Any

from fdcompile.config import Config
from fdcompile.errors import warn_user
from fdcompile.pipeline.identity import describe_parts, differences_of, digests_of

_LONGEST = 80
"""Characters of a value in a message."""


def as_config(config: Any) -> Config:
    """The configuration `config`: a `Config`, None for the default, or a plan for its recommended point.

    Raises:
        TypeError: it is none of these.
        ValueError: the plan recommends the stock pipeline with fewer steps.
    """
    if config is not None and hasattr(config, "best"):
        config = config.best()
    config = Config() if config is None else config
    if not isinstance(config, Config):
        given = repr(config) if len(repr(config)) < _LONGEST else f"a {type(config).__name__}"
        hint = ", from a file by fdcompile.Plan.load(path)" if isinstance(config, str | os.PathLike) else ""
        raise TypeError(f"config={given}: expected a fdcompile.Config, or a plan{hint}")
    return config


def check_made_for(config: Config, pipe: Any) -> tuple[str, ...]:
    """Warns if the plans of `config` were made for another UNet or scheduler than `pipe`'s, and returns the warning.

    Of several plans one must match; the others are for other schedulers.

    Raises:
        ValueError: they were, and ``config.strict`` is set.
    """
    made_for = [plan.made_for for plan in config.plans if plan.made_for is not None]
    if not made_for or len(made_for) < len(config.plans):
        return ()
    digests = digests_of(describe_parts(pipe))
    different = min((differences_of(digests, others) for others in made_for), key=len)
    if not different:
        return ()
    note = f"the plan was made for another pipeline ({', '.join(different)} differ)"
    if config.strict:
        raise ValueError(f"{note}: make one with this pipeline, in the precision that it runs in")
    warn_user(note)
    return (note,)
