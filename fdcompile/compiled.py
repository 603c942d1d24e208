"""A captured UNet whose stages can be run, each lowered once per group size."""

from __future__ import annotations

import time
from collections import Counter, defaultdict

from torch import Tensor, fx

from fdcompile.backends import Backend, Lowered
from fdcompile.backends.eager import EagerBackend
from fdcompile.capture import UNetCall
from fdcompile.config import Config
from fdcompile.flops import Shape, shapes
from fdcompile.passes import batch_steps, run_passes
from fdcompile.program import BindingTime, StagedProgram

Values = dict[str, Tensor]

_PER_RUN = ("schedule", "schedule_prompt")


StageCall = tuple[str, int | None, tuple[Shape, ...]]
"""Stage, number of steps in the call (None: not batched over steps), and what it was called with."""


class CompiledUNet:
    """One signature of a UNet: its staged program, lowered by `backend`.

    Attributes:
        program: the staged program.
        calls: how often each stage ran, by number of steps and shapes of its inputs.
        answered: how many UNet calls were answered, by shapes of the UNet's inputs.
        compile_seconds: seconds spent on the capture, in the passes, and by stage on batching, lowering, first calls.
    """

    def __init__(self, captured: fx.GraphModule, config: Config, backend: Backend) -> None:
        self.compile_seconds: dict[str, float] = defaultdict(float)
        began = time.perf_counter()
        self.program: StagedProgram = run_passes(captured, config.fresh, config.passes)
        self.compile_seconds["passes"] = time.perf_counter() - began
        self.calls: Counter[StageCall] = Counter()
        self.answered: Counter[tuple[Shape, ...]] = Counter()
        self._backend = backend
        self._batched: dict[StageCall, fx.GraphModule] = {}
        self._lowered: dict[StageCall, Lowered] = {}

    def bind_inputs(self, call: UNetCall, *times: BindingTime) -> Values:
        """The call's tensors that are known at one of `times`, under the names the stages give them."""
        pairs = zip(self.program.inputs, call.tensors, strict=True)
        return {value.name: tensor for value, tensor in pairs if value.time in times}

    def run(self, stage_name: str, known: Values, steps: int | None = None) -> Values:
        """Runs a stage, for `steps` steps at once if given, and returns its outputs by name.

        With `steps`, the stage's step-dependent inputs and all of its outputs have a leading axis of that length. An
        absent stage returns nothing.
        """
        stage = self.program.stages.get(stage_name)
        if stage is None:
            return {}
        arguments = [known[value.name] for value in stage.inputs]
        key = (stage_name, steps, shapes(arguments))
        self.calls[key] += 1
        if key in self._lowered:
            outputs = self._lowered[key](*arguments)
        else:
            began = time.perf_counter()
            lowered = self._lower(key, arguments)
            outputs = lowered(*arguments)
            self._lowered[key] = lowered
            self.compile_seconds[stage_name] += time.perf_counter() - began
        return dict(zip((value.name for value in stage.outputs), outputs, strict=True))

    def graph(self, key: StageCall) -> fx.GraphModule:
        """The graph that answers a stage call."""
        stage_name, steps, _ = key
        return self.program.stages[stage_name].graph_module if steps is None else self._batched[key]

    def forget_calls(self) -> None:
        self.calls.clear()
        self.answered.clear()

    def _lower(self, key: StageCall, arguments: list[Tensor]) -> Lowered:
        stage_name, steps, _ = key
        if steps is not None and key not in self._batched:
            self._batched[key] = batch_steps(self.program.stages[stage_name], arguments)
        # A compiled schedule stage would be compiled anew for every number of steps, to save a few small GEMMs.
        backend = EagerBackend() if stage_name in _PER_RUN else self._backend
        return backend.lower(self.graph(key), stage_name)
