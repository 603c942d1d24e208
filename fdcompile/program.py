"""The staged program: what the passes make of a UNet and what the executor runs."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx


class BindingTime(enum.Enum):
    """The earliest moment at which a value is known."""

    STATIC = "static"
    SCHEDULE = "schedule"
    PROMPT = "prompt"
    SCHEDULE_PROMPT = "schedule+prompt"
    LATENT = "latent"
    """The current latent itself, or weight-free arithmetic on it: as fresh or as stale as its reader."""
    KEY = "key"
    STEP = "step"

    def __str__(self) -> str:
        return self.value


STAGE_ORDER = ("schedule", "prompt", "schedule_prompt", "shallow", "encoder", "decoder")
"""Stages in the order in which a key step runs them.

``shallow`` holds fresh modules that need no features (``conv_in``, ``down_blocks.0`` in a partial cut): they run at
every step, before the encoder. ``schedule_prompt`` holds what needs both (SDXL's ``emb``). Either may be absent.
"""


@dataclass(frozen=True)
class Value:
    """A tensor that crosses a stage's border. `batch` is spelled ``B`` in `shape`."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    time: BindingTime

    @classmethod
    def of(cls, node: fx.Node) -> Value:
        tensor = node.meta["val"]
        shape = tuple(size if isinstance(size, int) else _spell(size) for size in tensor.shape)
        return cls(node.name, shape, tensor.dtype, node.meta["binding_time"])

    def __str__(self) -> str:
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


def _spell(size: torch.SymInt) -> str:
    expression = size.node.expr
    names = {symbol: "B" for symbol in expression.free_symbols} if len(expression.free_symbols) == 1 else {}
    return str(expression.subs(names))


@dataclass
class Stage:
    """A subgraph that runs as a unit. `graph_module` takes `inputs` and returns a tuple of `outputs`, in order."""

    name: str
    graph_module: fx.GraphModule
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    @property
    def op_counts(self) -> Counter[str]:
        return Counter(str(node.target) for node in self.graph_module.graph.nodes if node.op == "call_function")

    @property
    def stepwise_inputs(self) -> tuple[str, ...]:
        """Inputs that differ between the steps of a group when no step reads the latent."""
        return tuple(v.name for v in self.inputs if v.time in (BindingTime.SCHEDULE, BindingTime.SCHEDULE_PROMPT))

    def __str__(self) -> str:
        count = sum(self.op_counts.values())
        lines = [f"{self.name} ({count} ops)"]
        lines += [f"  in   {value}  [{value.time}]" for value in self.inputs]
        lines += [f"  out  {value}" for value in self.outputs]
        return "\n".join(lines)


@dataclass
class StagedProgram:
    """A UNet sorted by when its values are known.

    Attributes:
        inputs: the UNet's own tensor inputs.
        stages: stage name to stage, in the order of `STAGE_ORDER`; a stage without work is absent.
        output: name of the value that is the UNet's prediction.
        graph_module: the whole captured graph, equal to the stages run one after the other.
    """

    inputs: tuple[Value, ...]
    stages: dict[str, Stage]
    output: str
    graph_module: fx.GraphModule = field(repr=False)

    @property
    def parallel(self) -> bool:
        """Whether the steps of a group may be decoded together: nothing fresh reads the current latent."""
        fresh = [self.stages[name] for name in ("shallow", "decoder") if name in self.stages]
        return not any(value.time is BindingTime.LATENT for stage in fresh for value in stage.inputs)

    @property
    def features(self) -> tuple[Value, ...]:
        """What the encoder stage hands on and the executor holds for a group."""
        return self.stages["encoder"].outputs if "encoder" in self.stages else ()

    def hoisted(self) -> Iterator[tuple[str, str]]:
        """Yields (module path, stage) of every weighted operation that left the per-step stages by binding time."""
        for name in ("schedule", "prompt", "schedule_prompt", "encoder"):
            stage = self.stages.get(name)
            for node in stage.graph_module.graph.nodes if stage else ():
                if any(argument.op == "get_attr" for argument in node.all_input_nodes):
                    path = module_path(node)
                    if name != "encoder" or node.meta.get("fresh"):
                        yield path, name

    def __str__(self) -> str:
        head = "inputs " + ", ".join(f"{value} [{value.time}]" for value in self.inputs)
        decode = "steps of a group decoded in parallel" if self.parallel else "steps decoded one by one"
        hoisted = [f"  {path} -> {stage}" for path, stage in self.hoisted()]
        parts = [head, *map(str, self.stages.values()), f"returns {self.output}; {decode}", "hoisted", *hoisted]
        return "\n".join(parts)


def copy_of(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares the weights, takes its inputs flat and returns its outputs as a flat tuple."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    return fx.GraphModule(graph_module, graph)


def module_path(node: fx.Node) -> str:
    """The path, inside the UNet, of the module that issued `node`; empty at the UNet's own level."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path: str = list(stack.values())[-1][0]
    return path.removeprefix("unet").removeprefix(".")
