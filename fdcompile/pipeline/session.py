"""Sessions: an optimized UNet with one scheduler, attached by `optimize` and detached by `restore`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fdcompile.backends import resolve_backend
from fdcompile.config import Config
from fdcompile.pipeline.hook import CallHandler, Forward, attach, attached, detach
from fdcompile.pipeline.noise import PriorNoise, prior_noise
from fdcompile.pipeline.plans import check_made_for
from fdcompile.pipeline.scheduler import WatchedScheduler, followers, leave, watch
from fdcompile.runtime.caller import Caller, unwrap
from fdcompile.runtime.executor import Executor
from fdcompile.runtime.forward_call import ForwardCall
from fdcompile.runtime.graph_cache import GraphCache
from fdcompile.runtime.runner_cache import CompiledRunnerCache, RunnerCache


class Session:
    """Passes the calls of a UNet to the executor, and follows the scheduler and the ControlNets of its pipelines.

    Pipelines that share both the UNet and the scheduler share a session, because their calls cannot be distinguished.
    Pipelines that share only one of them have separate sessions.

    Attributes:
        pipes: the pipelines of the session, which follows the scheduler of the first.
    """

    def __init__(self, pipe: Any, config: Config, runner_cache: RunnerCache | None = None) -> None:
        self.pipes = [pipe]
        self.unet: nn.Module = unwrap(pipe.unet)
        self.config = config
        if runner_cache is None:
            backend = functools.partial(resolve_backend, config.backend)
            runner_cache = CompiledRunnerCache(graph_cache_of(self.unet), config, backend)
        self.executor = Executor(self.unet, config, runner_cache, check_made_for(config, pipe))
        self.noise: PriorNoise | None = prior_noise(config, self.executor, pipe)
        self._scheduler: Any = None
        self._watched: WatchedScheduler | None = None
        self._parts: list[tuple[nn.Module, CallHandler]] = []
        self._controlnets: list[nn.Module] = []
        self._handle_unet = SessionHandler(self, self._unet_called)
        self._handle_controlnet = SessionHandler(self, self.executor.controlnet_called)

    def attach(self) -> None:
        """Installs all hooks, or none if one fails."""
        try:
            self._add(self.unet, self._handle_unet)
            self.follow()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        while self._parts:
            detach(*self._parts.pop())
        self._controlnets = []
        self._leave_scheduler()

    def follow(self) -> None:
        """Attaches to the current scheduler and ControlNets of the pipelines."""
        if self.pipes[0].scheduler is not self._scheduler:
            self._leave_scheduler()
            self._watched = watch(self.pipes[0].scheduler, self)
            self._scheduler = self.pipes[0].scheduler
        # Runs at every step; looking up a missing attribute of a pipeline is slow.
        controlnets = [part for pipe in self.pipes if isinstance(part := vars(pipe).get("controlnet"), nn.Module)]
        if controlnets != self._controlnets:
            while len(self._parts) > 1:
                detach(*self._parts.pop())
            for controlnet in dict.fromkeys(controlnets):
                self._add(controlnet, self._handle_controlnet)
            self._controlnets = controlnets

    def knows(self, timestep: Any) -> bool:
        """Whether this session's schedule has `timestep`."""
        return self.executor.clock.preview(timestep, self._scheduler.timesteps) is not None

    def _unet_called(self, event: ForwardCall) -> Any:
        assert self._watched is not None
        self._watched.current = self
        return self.executor.unet_called(event)

    def called(self, forward: Forward, wrapped: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardCall:
        """Makes the event of a call of the UNet or of a ControlNet."""
        self.follow()
        return ForwardCall(forward, wrapped, args, kwargs, self._scheduler, self._find_caller)

    def _find_caller(self) -> Caller:
        return Caller.of(self.unet, fallback=self.pipes[0])

    def schedule_begins(self) -> None:
        """Attaches to parts that were replaced since the last run."""
        self.follow()

    def sample_for_step(self, sample: Tensor) -> Tensor:
        """`sample`, with noise injected if that is configured."""
        return sample if self.noise is None else self.noise.inject(sample, self._scheduler)

    def scheduler_stepped(self) -> None:
        """Informs the clock that the scheduler has stepped."""
        assert self._watched is not None
        self._watched.current = None
        self.executor.clock.scheduler_stepped()

    def _add(self, part: nn.Module, handler: CallHandler) -> None:
        self._parts.append((part, handler))
        attach(part, handler)

    def _leave_scheduler(self) -> None:
        if self._scheduler is not None:
            leave(self._scheduler, self)
        self._scheduler = self._watched = None


class SessionHandler:
    """Handles the calls of one hooked module in a session."""

    def __init__(self, session: Session, take: Callable[[ForwardCall], Any]) -> None:
        self.session = session
        self._take = take

    def knows(self, timestep: Any) -> bool:
        return self.session.knows(timestep)

    def __call__(self, forward: Forward, wrapped: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._take(self.session.called(forward, wrapped, args, kwargs))


def sessions_of(unet: Any) -> list[Session]:
    """The sessions of `unet`, most recently used first."""
    hook = attached(unwrap(unet))
    handlers = hook.handlers if hook is not None else []
    return [handler.session for handler in handlers if isinstance(handler, SessionHandler)]


def graph_cache_of(unet: nn.Module) -> GraphCache:
    """The graph cache that the sessions of `unet` share, or a new one."""
    return next((session.executor.runner_cache.graph_cache for session in sessions_of(unet)), None) or GraphCache(unet)


def find_session(pipe: Any) -> Session | None:
    """Returns the session of `pipe`, a pipeline or a UNet, even if the pipeline's UNet was replaced; else None."""
    return next(_candidates(pipe), None)


def _candidates(pipe: Any) -> Iterator[Session]:
    if isinstance(pipe, nn.Module):
        yield from sessions_of(pipe)
        return
    scheduler = getattr(pipe, "scheduler", None)
    on_unet = sessions_of(getattr(pipe, "unet", None))
    yield from (session for session in on_unet if session.pipes[0].scheduler is scheduler)
    yield from (session for session in on_unet if any(known is pipe for known in session.pipes))
    for session in followers(scheduler):
        if isinstance(session, Session) and any(known is pipe for known in session.pipes):
            yield session
