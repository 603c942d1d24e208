"""The staged program, which the passes make from a UNet and the executor runs."""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import sympy
import torch
from pydantic import PlainSerializer, PlainValidator
from torch import fx

from fdcompile.graph.flops import Shape, count_flops


class BindingTime(enum.Enum):
    """The earliest time at which a value is known."""

    STATIC = "static"
    SCHEDULE = "schedule"
    PROMPT = "prompt"
    SCHEDULE_PROMPT = "schedule+prompt"
    LATENT = "latent"
    """The current latent, or weight-free arithmetic on it, which each stage that reads it computes again."""
    KEY = "key"
    KEY_BEFORE = "key before"
    """A feature at the key step before the last one, kept by the executor (see `forecast_features`)."""
    STEP = "step"

    def __str__(self) -> str:
        return self.value


STAGE_ORDER = ("schedule", "prompt", "schedule_prompt", "shallow", "encoder", "decoder")
"""Stages in the order in which a key step runs them.

``shallow`` contains recomputed modules that read no features (``conv_in``, ``down_blocks.0`` in a partial cut), which
run at every step before the encoder. ``schedule_prompt`` contains values that depend on both (SDXL's ``emb``). Both are
optional.
"""

BEFORE = "_before"
"""Suffix of decoder inputs that are features of the key step before the last one."""

FORECAST_WEIGHT = "forecast_weight"
"""Name of the decoder input with a step's weight of the features of the key step before the last one."""


_WHY = {
    "schedule": "which depends on the timesteps only: once per run, all steps in one batch",
    "prompt": "which depends on the prompt only: once per run",
    "schedule_prompt": "which depends on both: once per run, all steps in one batch",
    "encoder": "because it sees neither a step's time nor its latent: once per group",
}


DType = Annotated[
    torch.dtype, PlainValidator(lambda name: getattr(torch, name)), PlainSerializer(lambda dtype: spell_dtype(dtype))
]
"""A type, written as ``"float32"`` in JSON."""


def spell_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a stage.

    `shape` contains ``B`` for the number of latents and, if the graph serves several sizes, ``H`` and ``W`` for their
    height and width: ``("B", 320, "H/2", "W/2")``.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: DType
    time: BindingTime

    @classmethod
    def of(cls, node: fx.Node, sample: fx.Node) -> TensorSpec:
        """Makes the specification of `node`, in the graph of a UNet with the latents `sample`, ``[B, ..., H, W]``."""
        tensor, latents = node.meta["val"], sample.meta["val"].shape
        spelled = _spellings({"B": latents[0], "H": latents[-2], "W": latents[-1]})
        shape = tuple(size if isinstance(size, int) else str(size.node.expr.subs(spelled)) for size in tensor.shape)
        return cls(node.name, shape, tensor.dtype, node.meta["binding_time"])

    def size_for(self, batch: Any, steps: Any = None, sides: tuple[Any, Any] | None = None) -> torch.Size:
        """Size for `batch` latents with `sides` (height, width), with a leading axis of `steps` if given.

        Arguments are ints or SymInts. `sides` may be omitted if they are fixed.
        """
        named = dict(zip("BHW", (batch, *(sides or ())), strict=False))
        sizes = (size if isinstance(size, int) else _evaluate(size, named) for size in self.shape)
        leading = () if steps is None else (steps,)
        return torch.Size((*leading, *sizes))

    def multiple(self) -> int:
        """Smallest number that height and width must be a multiple of for integer sizes."""
        spelled = (sympy.sympify(size) for size in self.shape if isinstance(size, str))
        return math.lcm(*(int(sympy.fraction(size)[1]) for size in spelled))

    def __str__(self) -> str:
        return f"{self.name}: {spell_dtype(self.dtype)}[{', '.join(map(str, self.shape))}]"


def at_sides(shape: Iterable[int | str], height: int, width: int) -> tuple[int | str, ...]:
    """Evaluates the shape of a `TensorSpec` for latents of this height and width; ``B`` remains."""
    named = {"H": height, "W": width}
    sizes = (size if isinstance(size, int) else sympy.sympify(size).subs(named) for size in shape)
    return tuple(int(size) if isinstance(size, int | sympy.Integer) else str(size) for size in sizes)


def _evaluate(size: str, named: dict[str, Any]) -> Any:
    numerator, denominator = sympy.fraction(sympy.sympify(size))
    whole = sympy.lambdify(list(named), numerator)(*named.values())
    return whole if denominator == 1 else whole // int(denominator)


def _spellings(named: dict[str, int | torch.SymInt]) -> dict[sympy.Symbol, sympy.Expr]:
    """Expressions for the symbols of a graph, such that the sizes in `named` are written as their names."""
    spellings = {}
    for name, size in named.items():
        if isinstance(size, torch.SymInt):
            (symbol,) = size.node.expr.free_symbols  # the size is a multiple of the symbol
            spellings[symbol] = sympy.Symbol(name) * symbol / size.node.expr
    return spellings


@dataclass(frozen=True)
class StageSpec(ABC):
    """The interface of a subgraph that runs as a unit.

    Attributes:
        inputs: inputs, in order.
        outputs: outputs, in order.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def stepwise_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that differ between the steps of a group that is decoded in parallel."""
        return tuple(v.name for v in self.inputs if v.time in (BindingTime.SCHEDULE, BindingTime.SCHEDULE_PROMPT))

    @property
    def multiple(self) -> int:
        """Smallest number that height and width must be a multiple of for integer sizes of all inputs."""
        return math.lcm(*(value.multiple() for value in self.inputs))

    @property
    @abstractmethod
    def op_counts(self) -> Counter[str]:
        """Number of operations of each kind in the graph."""

    @property
    def work(self) -> str:
        """Short description of the cost of the stage."""
        return f"{self.op_counts.total()} ops"

    def __str__(self) -> str:
        inputs = [f"  in   {value}  [{value.time}]" for value in self.inputs]
        return "\n".join([f"({self.work})", *inputs, *(f"  out  {value}" for value in self.outputs)])


@dataclass(frozen=True)
class Stage(StageSpec):
    """A subgraph that runs as a unit. `graph_module` takes `inputs` and returns a tuple of `outputs`, in order."""

    name: str
    graph_module: fx.GraphModule

    @property
    def op_counts(self) -> Counter[str]:
        return Counter(str(node.target) for node in self.graph_module.graph.nodes if node.op == "call_function")

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return device_of(self.graph_module)

    def input_shapes(self, batch: int, steps: int | None = None, sides: tuple[int, int] | None = None) -> list[Shape]:
        """Shapes of the inputs for `batch` latents, and for `steps` steps at once if given."""
        stepwise = () if steps is None else self.stepwise_inputs
        sizes = [value.size_for(batch, steps if value.name in stepwise else None, sides) for value in self.inputs]
        return [Shape(size, value.dtype, self.device) for size, value in zip(sizes, self.inputs, strict=True)]

    def flops(self, batch: int, sides: tuple[int, int] | None = None) -> int:
        """FLOPs of one run for `batch` latents."""
        return count_flops(self.graph_module, self.input_shapes(batch, sides=sides or self.example_sides))

    @property
    def example_sides(self) -> tuple[int, int] | None:
        """An example height and width; None if they are fixed."""
        spelled = any(set("HW") & set(str(size)) for value in self.inputs for size in value.shape)
        side = 8 * self.multiple
        return (side, side) if spelled else None

    @property
    def work(self) -> str:
        of = "latent" if self.example_sides is None else "latent of {}x{}".format(*self.example_sides)
        return f"{super().work}, {self.flops(2) / 2e9:.4g} GFLOP per {of}"

    def __str__(self) -> str:
        return f"{self.name} {super().__str__()}"


@dataclass
class ProgramSpec:
    """Interfaces of the stages of a UNet, without graphs: what is needed to run them.

    Attributes:
        inputs: the UNet's tensor inputs.
        stages: stages by name, in the order of `STAGE_ORDER`, without those that would be empty.
        output: name of the UNet's prediction.
    """

    inputs: tuple[TensorSpec, ...]
    stages: Mapping[str, StageSpec]
    output: str

    @property
    def parallel(self) -> bool:
        """Whether the steps of a group can be decoded together: no recomputed module reads the current latent."""
        recomputed = [self.stages[name] for name in ("shallow", "decoder") if name in self.stages]
        return not any(value.time is BindingTime.LATENT for stage in recomputed for value in stage.inputs)

    @property
    def features(self) -> tuple[TensorSpec, ...]:
        """Outputs of the encoder that the executor holds for the steps of a group."""
        read = {value.name for value in self.stages["decoder"].inputs} if "decoder" in self.stages else {self.output}
        encoder = self.stages.get("encoder")
        return () if encoder is None else tuple(value for value in encoder.outputs if value.name in read)

    @property
    def features_before(self) -> dict[str, str]:
        """Maps decoder inputs of the previous key step to their features; empty if nothing is forecast."""
        inputs = self.stages["decoder"].inputs if "decoder" in self.stages else ()
        held = [value.name for value in inputs if value.time is BindingTime.KEY_BEFORE]
        return {name: name.removesuffix(BEFORE) for name in held}

    def __str__(self) -> str:
        head = "inputs " + ", ".join(f"{value} [{value.time}]" for value in self.inputs)
        decode = "steps of a group decoded in parallel" if self.parallel else "steps decoded one by one"
        stages = [f"{name} {StageSpec.__str__(stage)}" for name, stage in self.stages.items()]
        return "\n".join([head, *stages, f"returns {self.output}; {decode}"])


@dataclass
class StagedProgram(ProgramSpec):
    """Stages of a UNet with their graphs.

    Attributes:
        graph_module: the whole captured graph, equivalent to all stages in order.
    """

    stages: dict[str, Stage]
    graph_module: fx.GraphModule = field(repr=False)

    def input_shapes(self, batch: int, sides: tuple[int, int] | None = None) -> list[Shape]:
        """Shapes of the UNet's inputs for `batch` latents."""
        device = device_of(self.graph_module)
        return [Shape(value.size_for(batch, sides=sides), value.dtype, device) for value in self.inputs]

    @property
    def hoisted(self) -> dict[str, list[str]]:
        """Paths of the modules that each stage computes less often than the stock UNet, apart from the cut's effect."""
        paths_of: dict[str, list[str]] = {}
        for name in set(_WHY) & set(self.stages):
            nodes = self.stages[name].graph_module.graph.nodes
            weighted = [node for node in nodes if any(source.op == "get_attr" for source in node.all_input_nodes)]
            paths = [module_path(node) for node in weighted if name != "encoder" or node.meta["recomputed"]]
            if paths:
                paths_of[name] = paths
        return {name: paths_of[name] for name in STAGE_ORDER if name in paths_of}

    def __str__(self) -> str:
        parts = [super().__str__()]
        for name, paths in self.hoisted.items():
            parts += [f"hoisted to {name}, {_WHY[name]}", *(f"  {path}" for path in paths)]
        return "\n".join(parts)


def device_of(graph_module: fx.GraphModule) -> torch.device:
    """Device of the inputs of a graph."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    return next((node.meta["val"].device for node in placeholders), torch.device("cpu"))


def module_path(node: fx.Node) -> str:
    """Path in the UNet of the module that `node` was traced in; empty for the UNet itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    root, _, path = list(stack.values())[-1][0].partition(".")
    return path if root == "unet" else ""
