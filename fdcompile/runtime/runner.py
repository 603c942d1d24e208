"""Runs the stages of a program, whatever they were lowered to."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fdcompile.backends.protocols import Lowered
from fdcompile.capture.call import UNetCall
from fdcompile.capture.guards import checksums
from fdcompile.config import Config
from fdcompile.graph.program import BindingTime, ProgramSpec

Tensors = dict[str, Tensor]

TRACING = threading.RLock()
"""Held while a graph is traced or compiled: torch traces one at a time in a process."""

PER_RUN = ("schedule", "schedule_prompt")
"""Stages that run for all steps of a schedule at once."""

StageCall = tuple[str, int | None, int]
"""Stage, number of steps in the call (None: not batched over steps), and number of latents."""


@dataclass(frozen=True)
class _Schedule:
    timesteps: tuple[object, ...]
    weights: list[int]
    values: Tensors


class ProgramRunner(ABC):
    """Runs the stages of one program, which answers the UNet calls of one signature.

    Attributes:
        config: the configuration that it serves.
        program: what its stages take and return.
        parallel: see `ProgramSpec.parallel`; it is asked for at every step.
        calls: how often each stage ran, by number of steps and of latents.
        answered: how many UNet calls were answered, by number of latents.
        compile_seconds: seconds spent on the capture, in the passes, and by stage on batching, lowering, first calls.
    """

    def __init__(self, config: Config, program: ProgramSpec) -> None:
        self.config = config
        self.program = program
        self.parallel = program.parallel
        self.calls: Counter[StageCall] = Counter()
        self.answered: Counter[int] = Counter()
        self.compile_seconds: dict[str, float] = defaultdict(float)
        self._lowered: dict[str, Lowered] = {}
        self._warm: set[StageCall] = set()
        self._max_steps: dict[int, int] = {}
        self._out_of_memory: set[int] = set()
        self._schedules: dict[int, _Schedule] = {}

    @property
    def notes(self) -> dict[str, tuple[str, ...]]:
        """What the backend has to say of how it runs a stage, by stage."""
        notes_of = {name: getattr(lowered, "notes", ()) for name, lowered in self._lowered.items()}
        return {name: notes for name, notes in notes_of.items() if notes}

    def bind_inputs(self, call: UNetCall, *times: BindingTime) -> Tensors:
        """The call's tensors that are known at one of `times`, under the names the stages give them."""
        pairs = zip(self.program.inputs, call.tensors, strict=True)
        return {value.name: tensor for value, tensor in pairs if value.time in times}

    def run(self, stage_name: str, known: Tensors, batch: int, steps: int | None = None) -> Tensors:
        """Runs a stage for `batch` latents, for `steps` steps at once if given, and returns its outputs by name.

        With `steps`, the stage's step-dependent inputs and all of its outputs have a leading axis of that length. An
        absent stage returns nothing.
        """
        stage = self.program.stages.get(stage_name)
        if stage is None:
            return {}
        arguments = [known[value.name] for value in stage.inputs]
        key = (stage_name, steps, batch)
        self.calls[key] += 1
        if key in self._warm:
            outputs = self._lowered[stage_name](*arguments)
        else:
            with TRACING:
                began = time.perf_counter()
                outputs = self._lower(stage_name, steps)(*arguments)
                self._warm.add(key)
                self.compile_seconds[stage_name] += time.perf_counter() - began
        return dict(zip((value.name for value in stage.outputs), outputs, strict=True))

    def schedule(self, call: UNetCall, timesteps: Tensor, host_timesteps: Sequence[float]) -> Tensors:
        """What is known of each of `timesteps` alone: values with a leading axis of one entry a step.

        They are kept from one run to the next, for each batch size, until the timesteps or the weights change.
        `host_timesteps` are the values of `timesteps`.
        """
        told = timesteps.dtype, timesteps.device, *host_timesteps
        weights = checksums(self._schedule_weights())
        kept = self._schedules.get(call.batch)
        if kept is None or weights != kept.weights or told != kept.timesteps:
            expanded = timesteps[:, None].expand(-1, call.batch).to(call.tensors[0].device)
            known = dict.fromkeys(self.bind_inputs(call, BindingTime.SCHEDULE), expanded)
            kept = _Schedule(told, weights, known | self.run("schedule", known, call.batch, len(timesteps)))
            self._schedules[call.batch] = kept
        return kept.values

    def reconfigure(self, config: Config) -> None:
        """From now on serves `config`, which has the same ``config.program``."""
        self.config = config
        self._max_steps.clear()
        self._out_of_memory.clear()

    def limit_steps(self, batch: int, steps: int) -> None:
        """From now on, takes at most `steps` steps at once for `batch` latents, as more do not fit on the device."""
        self._max_steps[batch] = steps
        self._out_of_memory.add(batch)

    def why_max_steps(self, batch: int) -> str:
        """What `max_steps` follows from."""
        return "the device ran out of memory with more" if batch in self._out_of_memory else self._why_max_steps()

    def begin_run(self) -> None:
        """Counts from zero."""
        self.compile_seconds.clear()
        self.calls.clear()
        self.answered.clear()

    @abstractmethod
    def max_steps(self, batch: int) -> int:
        """How many steps the decoder takes at once."""

    @abstractmethod
    def flops(self, call: StageCall) -> int:
        """FLOPs of a stage call that was made."""

    @abstractmethod
    def stock_flops(self, batch: int) -> int:
        """FLOPs of the stock UNet for `batch` latents."""

    @abstractmethod
    def _why_max_steps(self) -> str: ...

    @abstractmethod
    def _lower(self, stage_name: str, steps: int | None) -> Lowered: ...

    @abstractmethod
    def _schedule_weights(self) -> Iterable[Tensor]:
        """Those that the schedule's values follow from."""
