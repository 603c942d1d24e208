"""Runs the lowered stages of a program."""

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
from fdcompile.capture.guards import checksum_of
from fdcompile.config import Config
from fdcompile.graph.program import BindingTime, ProgramSpec

Tensors = dict[str, Tensor]

TRACING = threading.RLock()
"""Held while a graph is traced or compiled: torch traces one at a time in a process."""

PER_RUN = ("schedule", "schedule_prompt")
"""Stages that run once for all steps of a schedule."""

StageCall = tuple[str, int | None, int]
"""Stage, number of steps (None: not batched over steps), and number of latents of a call."""


@dataclass(frozen=True)
class _Schedule:
    timesteps: tuple[object, ...]
    weights: int
    values: Tensors


class ProgramRunner(ABC):
    """Runs the stages of one program, which answers the UNet calls of one signature.

    Attributes:
        config: the current configuration.
        program: inputs and outputs of the stages.
        parallel: `ProgramSpec.parallel`, cached, since it is read at every step.
        calls: number of calls of each stage, by number of steps and of latents.
        answered: number of UNet calls that were answered, by number of latents.
        compile_seconds: seconds spent on capture, on passes, and, by stage, on batching, lowering and first calls.
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
        self._limits: dict[int, tuple[int, str]] = {}
        self._schedules: dict[int, _Schedule] = {}

    @property
    def notes(self) -> dict[str, tuple[str, ...]]:
        """Notes of the backend on how it runs a stage, by stage."""
        notes_of = {name: getattr(lowered, "notes", ()) for name, lowered in self._lowered.items()}
        return {name: notes for name, notes in notes_of.items() if notes}

    def bind_inputs(self, call: UNetCall, *times: BindingTime) -> Tensors:
        """Tensors of `call` with one of the binding `times`, by the names of the stages' inputs."""
        pairs = zip(self.program.inputs, call.tensors, strict=True)
        return {value.name: tensor for value, tensor in pairs if value.time in times}

    def run(self, stage_name: str, known: Tensors, batch: int, steps: int | None = None) -> Tensors:
        """Runs a stage for `batch` latents, and for `steps` steps at once if given.

        With `steps`, the stage's stepwise inputs and all of its outputs have a leading axis of that length.

        Returns:
            The outputs by name; empty if the program has no such stage.
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
        """Values that depend on `timesteps` only, with a leading axis of one entry per step.

        They are cached between runs, for each batch size, until the timesteps or the weights change. `host_timesteps`
        are the values of `timesteps`.
        """
        key = timesteps.dtype, timesteps.device, *host_timesteps
        weights = checksum_of(self._schedule_weights())
        kept = self._schedules.get(call.batch)
        if kept is None or weights != kept.weights or key != kept.timesteps:
            expanded = timesteps[:, None].expand(-1, call.batch).to(call.tensors[0].device)
            known = dict.fromkeys(self.bind_inputs(call, BindingTime.SCHEDULE), expanded)
            kept = _Schedule(key, weights, known | self.run("schedule", known, call.batch, len(timesteps)))
            self._schedules[call.batch] = kept
        return kept.values

    def reconfigure(self, config: Config) -> None:
        """Replaces the configuration by `config`, which has the same ``config.program``."""
        self.config = config
        self._limits.clear()

    def max_steps(self, batch: int) -> tuple[int, str]:
        """Largest number of steps that the decoder takes at once for `batch` latents, and the reason for it."""
        if batch not in self._limits:
            self._limits[batch] = self._find_max_steps(batch)
        return self._limits[batch]

    def limit_steps(self, batch: int, steps: int) -> None:
        """Limits decoding to `steps` steps at once for `batch` latents, after the device ran out of memory."""
        self._limits[batch] = steps, "the device ran out of memory with more"

    def begin_run(self) -> None:
        """Resets the counts."""
        self.compile_seconds.clear()
        self.calls.clear()
        self.answered.clear()

    @abstractmethod
    def flops(self, call: StageCall) -> int:
        """FLOPs of one stage call."""

    @abstractmethod
    def stock_flops(self, batch: int) -> int:
        """FLOPs of the stock UNet for `batch` latents."""

    @abstractmethod
    def _find_max_steps(self, batch: int) -> tuple[int, str]: ...

    @abstractmethod
    def _lower(self, stage_name: str, steps: int | None) -> Lowered: ...

    @abstractmethod
    def _schedule_weights(self) -> Iterable[Tensor]:
        """Weights that the values of the schedule depend on."""
