"""Locates UNet calls in the schedule without reading from the device."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

from torch import Tensor

from fdcompile.capture.guards import equal


class Position(NamedTuple):
    """Position of a UNet call.

    Attributes:
        generation: number of the run; state of one run is never used in another.
        start: index in ``scheduler.timesteps`` of the run's first step (not 0 in img2img).
        step: index in ``scheduler.timesteps``.
        slot: number of UNet calls before this one since the last scheduler step.
        ambiguous: whether the scheduler has stepped more than once at a step of this run, so that several latents may
            be sampled in turn.
        backwards: whether each call is at the step before that of the last call, as in an inversion.
    """

    generation: int
    start: int
    step: int
    slot: int
    ambiguous: bool = False
    backwards: bool = False


class Clock:
    """Follows a sampler through ``scheduler.timesteps``.

    A pipeline passes elements of that tensor to its UNet. An element shares the tensor's memory, so its address gives
    the step without a device read, also where schedulers repeat a timestep (PNDM, Heun). A pipeline that continues with
    a copy of its scheduler may pass elements of the previous tensor, which are accepted as long as both are equal. Any
    other timestep has no position, and the stock UNet runs.
    """

    def __init__(self) -> None:
        self._timesteps: Tensor | None = None
        self._content: _Content | None = None
        self._copies: tuple[Any, Any] = (None, None)
        self._scheduler_stepped = False
        self.position: Position | None = None

    def locate(self, timestep: Any, timesteps: Any) -> Position | None:
        """Position of the UNet call with `timestep`; None if that is not an element of the schedule `timesteps`."""
        schedule, step = self._find(timestep, timesteps)
        if step is None:
            return None
        last, self.position = self.position, self._position(schedule, step)
        if last is None or self.position.generation != last.generation:
            self._timesteps, self._content = schedule, _Content(schedule)
        self._scheduler_stepped = False
        return self.position

    def preview(self, timestep: Any, timesteps: Any) -> Position | None:
        """Returns what `locate` would, without counting a call of the UNet."""
        schedule, step = self._find(timestep, timesteps)
        return None if step is None else self._position(schedule, step)

    def schedule_of(self, timestep: Any, timesteps: Tensor) -> Tensor:
        """The schedule that `timestep` is an element of, shape ``[steps]``."""
        schedule: Tensor = self._find(timestep, timesteps)[0]
        return schedule

    def scheduler_stepped(self) -> None:
        self._scheduler_stepped = True

    def _find(self, timestep: Any, timesteps: Any) -> tuple[Any, int | None]:
        """The schedule that `timestep` is an element of, and its index there."""
        followed = self._timesteps
        step = _index(timestep, timesteps)
        if step is None and followed is not None and followed is not timesteps:
            step = _index(timestep, followed)
            if step is not None and self._are_copies(followed, timesteps):
                return followed, step
            step = None
        return timesteps, step

    def _are_copies(self, one: Tensor, other: Any) -> bool:
        """Whether two schedules are equal. The result is kept, because the comparison synchronizes with the device."""
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
    """Content of a schedule at the start of a run: its bytes on a CPU, its version counter on other devices."""

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
