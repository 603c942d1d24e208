"""Observes calls of ``set_timesteps`` and ``step`` of a scheduler by any caller."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Follower(Protocol):
    """Receives the events of a scheduler."""

    def schedule_begins(self) -> None:
        """``set_timesteps`` was called."""

    def sample_for_step(self, sample: Tensor) -> Tensor:
        """Returns the sample to pass to the scheduler instead of `sample`."""

    def scheduler_stepped(self) -> None:
        """``step`` has returned."""


class WatchedScheduler:
    """A scheduler whose methods are replaced, with its followers.

    The methods are replaced on the class; other schedulers of this class, also copies, run the stock methods. A method
    that the user has set on the scheduler itself, or that its class does not have because it delegates to another
    scheduler, is replaced on the scheduler.

    Attributes:
        followers: all followers.
        current: the follower whose UNet was called last, which receives the next step.
    """

    def __init__(self, scheduler: Any) -> None:
        self.followers: list[Follower] = []
        self.current: Follower | None = None
        self._inside = False
        self._removals = []
        for name in ("step", "set_timesteps"):
            if hasattr(scheduler, name):
                on_class = hasattr(type(scheduler), name) and name not in vars(scheduler)
                place = type(scheduler) if on_class else scheduler
                replaced = _replace(place, name)
                self._removals.append(
                    weakref.finalize(self, _put_back, weakref.ref(place), (id(place), name), replaced)
                )

    def remove(self) -> None:
        """Restores the methods; so does dropping this object."""
        for put_back in self._removals:
            put_back()

    def call(self, name: str, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the `stock` method and sends the event, but none for nested calls."""
        if self._inside:
            return stock(*args, **kwargs)
        self._inside = True
        try:
            if name == "step":
                return self._step(stock, *args, **kwargs)
            result = stock(*args, **kwargs)
        finally:
            self._inside = False
        for follower in self.followers:
            follower.schedule_begins()
        return result

    def _step(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        follower = self.current
        if follower is None:
            return stock(*args, **kwargs)
        if len(args) > 2:
            args = (*args[:2], follower.sample_for_step(args[2]), *args[3:])
        elif "sample" in kwargs:
            kwargs["sample"] = follower.sample_for_step(kwargs["sample"])
        result = stock(*args, **kwargs)
        follower.scheduler_stepped()
        return result


_watched: weakref.WeakValueDictionary[int, WatchedScheduler] = weakref.WeakValueDictionary()
"""Watched schedulers by the scheduler's id. Only followers hold them, so that deleted pipelines are freed."""

_lock = threading.RLock()


def watch(scheduler: Any, follower: Follower) -> WatchedScheduler:
    """Starts to send events of `scheduler` to `follower`."""
    with _lock:
        watched = _watched.get(id(scheduler))
        if watched is None:
            watched = WatchedScheduler(scheduler)
            _watched[id(scheduler)] = watched
        watched.followers.append(follower)
    return watched


def leave(scheduler: Any, follower: Follower) -> None:
    """Stops sending events of `scheduler` to `follower`; the methods are restored with the last follower."""
    with _lock:
        watched = _watched[id(scheduler)]
        watched.followers.remove(follower)
        if watched.current is follower:
            watched.current = None
        if not watched.followers:
            del _watched[id(scheduler)]
            watched.remove()


def followers(scheduler: Any) -> list[Follower]:
    """The followers of `scheduler`."""
    watched = _watched.get(id(scheduler))
    return watched.followers if watched is not None else []


@dataclass
class _Replaced:
    """A replaced method; `original` is the previous method, None if that was inherited."""

    original: Any
    method: Any
    uses: int = 1


_replaced: dict[tuple[int, str], _Replaced] = {}
"""The last replacement at each place, by the id of the place and the method's name."""


def _replace(place: Any, name: str) -> _Replaced:
    """Replaces a method of a class or of one scheduler by one that looks up the followers.

    If other code has replaced it since, it is replaced again, because that method may not call this one.
    """
    last = _replaced.get((id(place), name))
    if last is not None and vars(place).get(name) is last.method:
        last.uses += 1
        return last
    original = getattr(place, name)
    on_class = isinstance(place, type)
    instance = None if on_class else weakref.ref(place)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        scheduler = args[0] if instance is None else instance()
        watched = _watched.get(id(scheduler))
        if watched is None:
            return original(*args, **kwargs)
        if on_class:
            return watched.call(name, functools.partial(original, scheduler), *args[1:], **kwargs)
        return watched.call(name, original, *args, **kwargs)

    replaced = _replaced[id(place), name] = _Replaced(vars(place).get(name), method)
    _set(place, name, method)
    return replaced


def _set(place: Any, name: str, method: Any) -> None:
    """Sets an attribute of a class or, past its ``__setattr__``, of one scheduler; None deletes it."""
    owner = type if isinstance(place, type) else object
    if method is None:
        owner.__delattr__(place, name)
    else:
        owner.__setattr__(place, name, method)


def _put_back(reference: weakref.ref[Any], key: tuple[int, str], replaced: _Replaced) -> None:
    replaced.uses -= 1
    if replaced.uses:
        return
    if _replaced.get(key) is replaced:
        del _replaced[key]
    place, name = reference(), key[1]
    if place is None or vars(place).get(name) is not replaced.method:
        return  # replaced by other code, through which it now calls the stock method
    _set(place, name, replaced.original)
