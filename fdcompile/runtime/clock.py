"""Which step is this? Answered without asking the device."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

from torch import Tensor

from fdcompile.capture.guards import equal


class Position(NamedTuple):
    """Where a UNet call stands.

    Attributes:
        generation: number of the run, so that nothing of one run is used in the next.
        start: index in ``scheduler.timesteps`` of the run's first step (not 0 in img2img).
        step: index in ``scheduler.timesteps``.
        slot: how many UNet calls came before this one since the last scheduler step.
        ambiguous: the scheduler has stepped more than once at a step of this run, so several latents may take turns.
        backwards: the calls walk from a step to the one before it, as an inversion does.
    """

    generation: int
    start: int
    step: int
    slot: int
    ambiguous: bool = False
    backwards: bool = False


class Clock:
    """Follows a sampler through ``scheduler.timesteps``.

    A pipeline hands its UNet an element of that tensor. The element shares the tensor's memory, so its address says
    which step it is, also where schedulers repeat a timestep (PNDM, Heun), and without reading it back from the
    device. A pipeline that goes on with a copy of its scheduler may hand on elements of the tensor before, which counts
    as long as both are equal. A timestep from anywhere else has no position, and its caller gets the full UNet.
    """

    def __init__(self) -> None:
        self._timesteps: Tensor | None = None
        self._content: _Content | None = None
        self._copies: tuple[Any, Any] = (None, None)
        self._scheduler_stepped = False
        self.position: Position | None = None

    def locate(self, timestep: Any, timesteps: Any) -> Position | None:
        """The position of the UNet call with `timestep`, or None if that is no element of the schedule `timesteps`."""
        schedule, step = self._find(timestep, timesteps)
        if step is None:
            return None
        last, self.position = self.position, self._position(schedule, step)
        if last is None or self.position.generation != last.generation:
            self._timesteps, self._content = schedule, _Content(schedule)
        self._scheduler_stepped = False
        return self.position

    def preview(self, timestep: Any, timesteps: Any) -> Position | None:
        """What `locate` would answer, without taking it for a call of the UNet."""
        schedule, step = self._find(timestep, timesteps)
        return None if step is None else self._position(schedule, step)

    def schedule_of(self, timestep: Any, timesteps: Tensor) -> Tensor:
        """The tensor that `timestep` is an element of: all timesteps of the schedule, shape ``[steps]``."""
        schedule: Tensor = self._find(timestep, timesteps)[0]
        return schedule

    def scheduler_stepped(self) -> None:
        self._scheduler_stepped = True

    def _find(self, timestep: Any, timesteps: Any) -> tuple[Any, int | None]:
        """The tensor that `timestep` is an element of, and where in it."""
        followed = self._timesteps
        step = _index(timestep, timesteps)
        if step is None and followed is not None and followed is not timesteps:
            step = _index(timestep, followed)
            if step is not None and self._are_copies(followed, timesteps):
                return followed, step
            step = None
        return timesteps, step

    def _are_copies(self, one: Tensor, other: Any) -> bool:
        """Whether two schedules are equal; compared once, because that waits for the device."""
        if self._copies[0] is not one or self._copies[1] is not other:
            if not isinstance(other, Tensor) or not equal(one, other):
                return False
            self._copies = one, other
        return True

    def _position(self, timesteps: Tensor, step: int) -> Position:
        last = self.position
        written = self._content is not None and self._content.written()
        if last is None or timesteps is not self._timesteps or written:
            return Position(last.generation + 1 if last else 0, step, step, 0)
        if step == last.step - 1 and last.start == last.step:
            return Position(last.generation, step, step, 0, backwards=True)
        if step < last.step or (step > last.step and last.backwards):
            return Position(last.generation + 1, step, step, 0)
        if step > last.step:
            return last._replace(step=step, slot=0)
        if not self._scheduler_stepped:
            return last._replace(slot=last.slot + 1)
        return last._replace(slot=0) if last.ambiguous else Position(last.generation + 1, step, step, 0, ambiguous=True)


class _Content:
    """What a schedule held when a run began: its memory on a CPU, elsewhere its version, so that no device is read."""

    def __init__(self, timesteps: Tensor) -> None:
        self._timesteps = timesteps
        self._seen = self._read()

    def written(self) -> bool:
        return self._read() != self._seen

    def _read(self) -> bytes | int | None:
        timesteps = self._timesteps
        if timesteps.device.type == "cpu" and timesteps.is_contiguous():
            return ctypes.string_at(timesteps.data_ptr(), timesteps.nbytes)
        return None if timesteps.is_inference() else timesteps._version


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
