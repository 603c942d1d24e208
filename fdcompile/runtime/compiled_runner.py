"""Runs a program made by the passes; a backend lowers each stage once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, fx

from fdcompile.backends.eager import EagerBackend
from fdcompile.backends.protocols import Backend, Lowered
from fdcompile.config import Config
from fdcompile.errors import warn_user
from fdcompile.graph.cut import check_cut
from fdcompile.graph.flops import Shape, count_flops
from fdcompile.graph.memory import free_bytes, live_bytes, most_steps, weight_bytes
from fdcompile.graph.program import Stage, StagedProgram, device_of
from fdcompile.graph.weights import lift_weights
from fdcompile.passes import batch_steps, enabled_passes, run_passes
from fdcompile.runtime.runner import PER_RUN, TRACING, ProgramRunner, StageCall
from fdcompile.runtime.static_weights import StaticWeights

_MEMORY_BUDGET = 0.15


class CompiledRunner(ProgramRunner):
    """Runs the passes on a captured UNet, and the resulting stages as lowered by `backend`.

    Attributes:
        captured: the graph before any pass.
    """

    def __init__(self, captured: fx.GraphModule, config: Config, backend: Backend, weights: StaticWeights) -> None:
        began = time.perf_counter()
        self.program: StagedProgram
        with TRACING:
            super().__init__(
                config, run_passes(captured, config.recompute, enabled_passes(config.disabled_passes), config.forecasts)
            )
            check_cut(self.program, config.recompute)
        self.compile_seconds["passes"] = time.perf_counter() - began
        self.captured = captured
        self._autocast = _current_autocast(device_of(captured).type)
        self._backend = backend
        self._static_weights = weights
        self._batched: dict[str, fx.GraphModule] = {}
        self._counted: dict[fx.GraphModule, dict[tuple[Shape, ...], int]] = {}
        stage = self.program.stages.get("schedule")
        self._weights_of_schedule = lift_weights(stage.graph_module)[1] if stage is not None else []

    def _find_max_steps(self, batch: int) -> tuple[int, str]:
        """The configured number of steps, or the largest that fits into the memory budget."""
        if self.config.max_parallel_steps != "auto":
            return self.config.max_parallel_steps, f"max_parallel_steps={self.config.max_parallel_steps}"
        with TRACING:
            self._lower("decoder", 1)
        decoder = self._batched.get("decoder")
        if decoder is None:
            return 1, "its operations cannot be batched"
        stage = self.program.stages["decoder"]
        one, two = (live_bytes(decoder, stage.input_shapes(batch, steps)) for steps in (1, 2))
        # Ranks must decode the same number of steps.
        free = free_bytes(next(self.captured.parameters()).device) if self.config.process_group is None else None
        fraction = self.config.memory_budget
        if fraction == "auto":
            if free is not None:
                return most_steps(one, two, free // 2), "no more fit into half of the memory that was free"
            fraction = _MEMORY_BUDGET
        weights = weight_bytes(self.captured)
        stock = weights + max(live_bytes(self.captured, self.program.input_shapes(batch)))
        budget = (1 + fraction) * stock - weights
        return most_steps(one, two, budget if free is None else min(budget, free)), f"memory_budget={fraction}"

    def runs(self, call: StageCall) -> tuple[fx.GraphModule, list[Shape], int]:
        """Graph of a stage call, its input shapes, and how many times it runs."""
        stage_name, steps, batch = call
        stage = self.program.stages[stage_name]
        if stage_name in self._batched:
            return self._batched[stage_name], stage.input_shapes(batch, steps), 1
        return stage.graph_module, stage.input_shapes(batch, sides=stage.example_sides), steps or 1

    def program_without(self, optional_pass: str) -> StagedProgram:
        """The program without an optional pass, made under the autocast of the capture, as `program` was."""
        passes = enabled_passes((*self.config.disabled_passes, optional_pass))
        with self._autocast:
            return run_passes(self.captured, self.config.recompute, passes, dump=False)

    def flops(self, call: StageCall) -> int:
        graph_module, inputs, count = self.runs(call)
        return count * self._count_flops(graph_module, inputs)

    def stock_flops(self, batch: int) -> int:
        return self._count_flops(self.program.graph_module, self.program.input_shapes(batch))

    def _count_flops(self, graph_module: fx.GraphModule, inputs: Sequence[Shape]) -> int:
        """FLOPs of `graph_module`, counted once for each set of input shapes."""
        counted = self._counted.setdefault(graph_module, {})
        key = tuple(inputs)
        if key not in counted:
            counted[key] = count_flops(graph_module, key)
        return counted[key]

    def _lower(self, stage_name: str, steps: int | None) -> Lowered:
        if stage_name not in self._lowered:
            # A compiled schedule stage would save a few small GEMMs once per schedule.
            backend = EagerBackend() if stage_name in PER_RUN else self._backend
            stage = self.program.stages[stage_name]
            if steps is not None:
                try:
                    self._batched[stage_name] = batch_steps(stage)
                except NotImplementedError as error:
                    warn_user(f"stage '{stage_name}' runs step by step: {error}")
            graph_module = self._batched.get(stage_name, stage.graph_module)
            lowered = backend.lower(self._static_weights.fold(graph_module), stage_name)
            stepwise = steps is not None and stage_name not in self._batched
            self._lowered[stage_name] = _one_by_one(lowered, stage) if stepwise else lowered
        return self._lowered[stage_name]

    def _schedule_weights(self) -> Iterable[Tensor]:
        return self._weights_of_schedule


def _current_autocast(device: str) -> AbstractContextManager[object]:
    """A context with the autocast that is now set on `device`."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


def _one_by_one(lowered: Lowered, stage: Stage) -> Lowered:
    """Wraps `lowered` to take and return values of several steps, which it runs one at a time."""
    stepwise = [value.name in stage.stepwise_inputs for value in stage.inputs]

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        count = next(len(tensor) for tensor, varies in zip(arguments, stepwise, strict=True) if varies)
        each = [
            lowered(*(tensor[step] if varies else tensor for tensor, varies in zip(arguments, stepwise, strict=True)))
            for step in range(count)
        ]
        return tuple(torch.stack(outputs) for outputs in zip(*each, strict=True))

    return run
