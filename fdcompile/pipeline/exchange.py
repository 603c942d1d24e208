"""Replaces the session of a pipeline, permanently or within a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fdcompile.pipeline.session import Session, find_session
from fdcompile.runtime.caller import unwrap
from fdcompile.runtime.runner_cache import CompiledRunnerCache


def exchange(previous: Session | None, session: Session) -> None:
    """Attaches `session` instead of `previous`, for its pipeline and those that share UNet and scheduler with it.

    If this fails, `previous` is attached again.
    """
    if previous is None:
        session.attach()
        return
    (pipe,), pipes = session.pipes, previous.pipes
    others = [other for other in pipes if other is not pipe]
    alike = [other for other in others if unwrap(other.unet) is session.unet and other.scheduler is pipe.scheduler]
    previous.detach()
    try:
        session.pipes += alike
        session.attach()
        cache = session.executor.runner_cache
        if left := [other for other in others if other not in alike]:
            previous.pipes = left
            previous.attach()
        elif isinstance(cache, CompiledRunnerCache) and previous.unet is session.unet:
            cache.adopt(previous.executor.runner_cache)
    except BaseException:
        session.detach()
        previous.pipes = pipes
        previous.attach()
        raise


@contextmanager
def running_stock(pipe: Any) -> Iterator[None]:
    """Detaches the session of `pipe`, if it has one, within the block."""
    session = find_session(pipe)
    if session is None:
        yield
        return
    session.detach()
    try:
        yield
    finally:
        session.attach()
