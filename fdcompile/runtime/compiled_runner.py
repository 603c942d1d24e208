"""Runs a program made by the passes; a backend lowers each stage once."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx

from fdcompile.backends.eager import EagerBackend
from fdcompile.backends.protocols import Backend, Lowered
from fdcompile.config import Config
from fdcompile.errors import warn_user
from fdcompile.graph.cut import check_cut
from fdcompile.graph.flops import Shape, count_flops
from fdcompile.graph.memory import free_bytes, live_bytes, most_steps, weight_bytes
from fdcompile.graph.program import Stage, StagedProgram
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
        self._backend = backend
        self._static_weights = weights
        self._batched: dict[str, fx.GraphModule] = {}
        self._counted: dict[fx.GraphModule, dict[tuple[Shape, ...], int]] = {}
        stage = self.program.stages.get("schedule")
        self._weights_of_schedule = lift_weights(stage.graph_module)[1] if stage is not None else []

    def max_steps(self, batch: int) -> int:
        """The configured number of steps, or the largest that fits into the memory budget."""
        if self.config.max_parallel_steps != "auto":
            return min(self.config.max_parallel_steps, self._max_steps.get(batch, sys.maxsize))
        if batch not in self._max_steps:
            with TRACING:
                self._lower("decoder", 1)
            decoder = self._batched.get("decoder")
            self._max_steps[batch] = 1 if decoder is None else self._fitting_steps(decoder, batch)
        return self._max_steps[batch]

    def _why_max_steps(self) -> str:
        if self.config.max_parallel_steps != "auto":
            return f"max_parallel_steps={self.config.max_parallel_steps}"
        if "decoder" not in self._batched:
            return "its operations cannot be batched"
        if self.config.memory_budget == "auto" and self._free_bytes() is not None:
            return "no more fit into half of the memory that was free"
        return f"memory_budget={self._memory_budget}"

    @property
    def _memory_budget(self) -> float:
        return _MEMORY_BUDGET if self.config.memory_budget == "auto" else self.config.memory_budget

    def _free_bytes(self) -> int | None:
        """Free device memory; None without CUDA, and for ranks, which must decode the same number of steps."""
        return free_bytes(next(self.captured.parameters()).device) if self.config.process_group is None else None

    def _fitting_steps(self, decoder: fx.GraphModule, batch: int) -> int:
        weights = weight_bytes(self.captured)
        stock = weights + max(live_bytes(self.captured, self.program.input_shapes(batch)))
        stage = self.program.stages["decoder"]
        one, two = (live_bytes(decoder, stage.input_shapes(batch, steps)) for steps in (1, 2))
        free = self._free_bytes()
        if free is not None and self.config.memory_budget == "auto":
            return most_steps(one, two, free // 2)
        budget = (1 + self._memory_budget) * stock - weights
        return most_steps(one, two, budget if free is None else min(budget, free))

    def runs(self, call: StageCall) -> tuple[fx.GraphModule, list[Shape], int]:
        """Graph of a stage call, its input shapes, and how many times it runs."""
        stage_name, steps, batch = call
        stage = self.program.stages[stage_name]
        if stage_name in self._batched:
            return self._batched[stage_name], stage.input_shapes(batch, steps), 1
        return stage.graph_module, stage.input_shapes(batch, sides=stage.example_sides), steps or 1

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
