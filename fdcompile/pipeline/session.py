"""An optimised UNet under one scheduler: what `optimize` attaches to a stock pipeline, and `restore` takes off."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fdcompile.backends import resolve_backend
from fdcompile.config import Config
from fdcompile.pipeline.controlnet import ControlNets
from fdcompile.pipeline.noise import PriorNoise, prior_noise
from fdcompile.pipeline.part import Answer, Forward, attach, attached, detach
from fdcompile.pipeline.scheduler import WatchedScheduler, followers, leave, watch
from fdcompile.runtime.clock import Clock
from fdcompile.runtime.executor import Executor
from fdcompile.runtime.forecast import Guidance
from fdcompile.runtime.programs import CapturedPrograms, Captures, Programs


class Session:
    """Hands the calls of a UNet to the executor, and follows the scheduler and the ControlNets of its pipes.

    Pipes that share both the UNet and the scheduler share a session, because their calls look the same. Those that
    share only one of them have sessions of their own.

    Attributes:
        pipes: those that it was made for; the scheduler is the first one's.
    """

    def __init__(self, pipe: Any, config: Config, programs: Programs | None = None) -> None:
        self.pipes = [pipe]
        self.unet: nn.Module = unwrap(pipe.unet)
        self.config = config
        if programs is None:
            backend = functools.partial(resolve_backend, config.backend)
            programs = CapturedPrograms(captures_of(self.unet), config, backend)
        self.controlnets = ControlNets()
        clock = Clock(lambda: self.pipes[0].scheduler)
        told = self._announced_steps, self._guidance
        self.executor = Executor(self.unet, config, clock, programs, self.controlnets, *told)
        self.controlnets.executor = self.executor
        self.noise: PriorNoise | None = prior_noise(config, self.executor, pipe)
        self._scheduler: Any = None
        self._watched: WatchedScheduler | None = None
        self._parts: list[tuple[nn.Module, Answer]] = []
        self._followed: list[nn.Module] = []

    def attach(self) -> None:
        """Installs everything, or nothing if it fails."""
        try:
            self._add(self.unet, self)
            self.follow()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        while self._parts:
            detach(*self._parts.pop())
        self._followed = []
        self._leave_scheduler()

    def follow(self) -> None:
        """Watches the scheduler and the ControlNets that the pipes have now."""
        if self.pipes[0].scheduler is not self._scheduler:
            self._leave_scheduler()
            self._watched = watch(self.pipes[0].scheduler, self)
            self._scheduler = self.pipes[0].scheduler
        # Asked at every step; a pipeline looks long for an attribute that it has not.
        controlnets = [own for pipe in self.pipes if isinstance(own := vars(pipe).get("controlnet"), nn.Module)]
        if controlnets != self._followed:
            while len(self._parts) > 1:
                detach(*self._parts.pop())
            for controlnet in dict.fromkeys(controlnets):
                self._add(controlnet, self.controlnets)
            self._followed = controlnets

    def knows(self, timestep: Any) -> bool:
        """Whether `timestep` is of this session's schedule."""
        return self.executor.clock.preview(timestep) is not None

    def __call__(self, forward: Forward, wrapped: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answers a call of the UNet."""
        self.follow()
        assert self._watched is not None
        self._watched.current = self
        return self.executor(forward, wrapped, args, kwargs)

    def schedule_begins(self) -> None:
        """Follows what was exchanged since the last run before it is called."""
        self.follow()

    def sample_for_step(self, sample: Tensor) -> Tensor:
        """With some of the initial noise, if that is asked for."""
        return sample if self.noise is None else self.noise.inject(sample, self._scheduler)

    def scheduler_stepped(self) -> None:
        """The latent has moved on."""
        assert self._watched is not None
        self._watched.current = None
        self.executor.clock.scheduler_stepped()

    def _add(self, part: nn.Module, answer: Answer) -> None:
        self._parts.append((part, answer))
        attach(part, answer)

    def _leave_scheduler(self) -> None:
        if self._scheduler is not None:
            leave(self._scheduler, self)
        self._scheduler = self._watched = None

    def _announced_steps(self) -> int | None:
        """How many steps a pipeline that stops early (``denoising_end``) has said it will run."""
        pipe = self.pipes[0]
        stops_early = getattr(pipe, "_denoising_end", None) is not None
        return getattr(pipe, "_num_timesteps", None) if stops_early else None

    def _guidance(self) -> Guidance | None:
        """Smallest and largest guidance scale of the pipes' last calls; None where they say none."""
        said = [own for pipe in self.pipes if (own := guidance_of(pipe)) is not None]
        return (min(low for low, _ in said), max(high for _, high in said)) if said else None


def guidance_of(pipe: Any) -> Guidance | None:
    """Smallest and largest guidance scale of the call that `pipe` is in or has made last; None if it says none."""
    scale = getattr(pipe, "guidance_scale", None)
    if isinstance(scale, Tensor):  # one a frame
        return scale.min().item(), scale.max().item()
    return (float(scale), float(scale)) if isinstance(scale, int | float) else None


def unwrap(unet: Any) -> Any:
    """`unet` without what ``torch.compile`` has put around it."""
    return getattr(unet, "_orig_mod", unet)


def sessions_of(unet: Any) -> list[Session]:
    """All sessions of `unet`, the one that answered last first."""
    hook = attached(unwrap(unet))
    return [answer for answer in hook.answers if isinstance(answer, Session)] if hook is not None else []


def captures_of(unet: nn.Module) -> Captures:
    """The graphs that other sessions of `unet` have, or none yet."""
    return next((session.executor.programs.captures for session in sessions_of(unet)), None) or Captures(unet)


def find_session(pipe: Any) -> Session | None:
    """Whose calls those of `pipe`, a pipeline or a UNet, are; else the one made for it, if its UNet was replaced."""
    return next(_candidates(pipe), None)


def _candidates(pipe: Any) -> Iterator[Session]:
    if isinstance(pipe, nn.Module):
        yield from sessions_of(pipe)
        return
    scheduler = getattr(pipe, "scheduler", None)
    on_unet = sessions_of(getattr(pipe, "unet", None))
    yield from (own for own in on_unet if own.pipes[0].scheduler is scheduler)
    yield from (own for own in on_unet if any(known is pipe for known in own.pipes))
    for own in followers(scheduler):
        if isinstance(own, Session) and any(known is pipe for known in own.pipes):
            yield own
