"""Which step is this? Answered without asking the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Position:
    """Where a UNet call stands.

    Attributes:
        generation: number of the run, so that nothing of one run is used in the next.
        start: index in ``scheduler.timesteps`` of the run's first step (not 0 in img2img).
        step: index in ``scheduler.timesteps``.
        lane: how many UNet calls came before this one since the last scheduler step.
    """

    generation: int
    start: int
    step: int
    lane: int


class Clock:
    """Follows a sampler through ``scheduler.timesteps``.

    A pipeline hands its UNet an element of that tensor. The element shares the tensor's memory, so its address says
    which step it is, also where schedulers repeat a timestep (PNDM, Heun), and without reading it back from the
    device. A timestep from anywhere else has no position, and its caller gets the full UNet.
    """

    def __init__(self, scheduler: Callable[[], Any]) -> None:
        self._scheduler = scheduler
        self._timesteps: Tensor | None = None
        self._scheduler_stepped = False
        self.position: Position | None = None

    @property
    def timesteps(self) -> Tensor:
        """All timesteps of the schedule, shape ``[steps]``, on the device."""
        assert self._timesteps is not None
        return self._timesteps

    def locate(self, timestep: Any) -> Position | None:
        """The position of the UNet call with `timestep`, or None if it is not an element of the schedule."""
        timesteps = self._scheduler().timesteps
        position = self.preview(timestep)
        if position is not None:
            self._timesteps = timesteps
            self._scheduler_stepped = False
            self.position = position
        return position

    def preview(self, timestep: Any) -> Position | None:
        """What `locate` would answer, without taking it for a call of the UNet."""
        timesteps = self._scheduler().timesteps
        step = _index(timestep, timesteps)
        if step is None:
            return None
        last = self.position
        if last is None or timesteps is not self._timesteps or step < last.step:
            return Position(last.generation + 1 if last else 0, step, step, 0)
        if step > last.step:
            return Position(last.generation, last.start, step, 0)
        if self._scheduler_stepped:
            return Position(last.generation + 1, step, step, 0)
        return Position(last.generation, last.start, step, last.lane + 1)

    def scheduler_stepped(self) -> None:
        self._scheduler_stepped = True


def _index(timestep: Any, timesteps: Any) -> int | None:
    if not isinstance(timestep, Tensor) or not isinstance(timesteps, Tensor) or timesteps.ndim != 1:
        return None
    one_value = timestep.numel() == 1 or all(stride == 0 for stride in timestep.stride())
    if not one_value or timestep.dtype != timesteps.dtype or timestep.device != timesteps.device:
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    offset = int(timestep.storage_offset() - timesteps.storage_offset())
    step, rest = divmod(offset, timesteps.stride(0))
    return step if rest == 0 and 0 <= step < len(timesteps) else None
