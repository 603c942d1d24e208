"""Rules of well-formed graphs and programs: the facts that passes ensure, and their checks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fdcompile.graph.flops import concrete_shape, concrete_size
from fdcompile.graph.program import FORECAST_WEIGHT, STAGE_ORDER, BindingTime, StagedProgram, module_path
from fdcompile.passes.simplify import ASSERTIONS

aten = torch.ops.aten


class VerificationError(RuntimeError):
    """A graph or a program is malformed; the message names the node or the stage."""


def verify(graph_module: fx.GraphModule, facts: Collection[str]) -> None:
    """Checks that `facts`, keys of `FACTS`, hold for `graph_module`.

    Raises:
        VerificationError: naming the fact and the first node that breaks it.
    """
    for name in FACTS:
        if name in facts:
            FACTS[name](graph_module)


def _is_functional(graph_module: fx.GraphModule) -> None:
    """Checks that it is functional, with one tensor output, binding times on inputs and metadata on values."""
    graph_module.graph.lint()
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and not isinstance(node.meta.get("binding_time"), BindingTime):
            raise VerificationError(f"input '{node.name}' has no binding time")
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise VerificationError(f"'{node.name}' ({node.target}) writes to its input; stages must be functional")
        if node.op == "output" and len(node.args[0]) != 1:
            raise VerificationError(f"expected one output, the noise prediction, found {len(node.args[0])}")
        asserts = isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns
        if node.op != "output" and not asserts and "val" not in node.meta:
            raise VerificationError(f"'{node.name}' ({node.target}) has no 'val' metadata")


def _is_simple(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.nodes:
        if node.target in ASSERTIONS or node.target is aten.view.default:
            raise VerificationError(f"'{node.name}' ({node.target}) should have been removed or replaced")
        if not node.users and node.op not in ("placeholder", "output"):
            raise VerificationError(f"nothing reads '{node.name}' ({node.target})")


_MAY_READ = {
    BindingTime.STATIC: {BindingTime.STATIC},
    BindingTime.SCHEDULE: {BindingTime.STATIC, BindingTime.SCHEDULE},
    BindingTime.PROMPT: {BindingTime.STATIC, BindingTime.PROMPT},
    BindingTime.SCHEDULE_PROMPT: {
        *(BindingTime.STATIC, BindingTime.SCHEDULE, BindingTime.PROMPT, BindingTime.SCHEDULE_PROMPT)
    },
    BindingTime.LATENT: {BindingTime.STATIC, BindingTime.LATENT},
    BindingTime.KEY_BEFORE: set(),  # an input of a stage
    BindingTime.KEY: set(BindingTime),  # reused: its inputs count as of the key step
    BindingTime.STEP: set(BindingTime),
}
_ONCE_PER_GROUP = {BindingTime.STATIC, BindingTime.PROMPT, BindingTime.KEY}


def _is_bound(graph_module: fx.GraphModule) -> None:
    """Checks that every node has a binding time, no earlier than those of its inputs."""
    owners = {name for name, _ in graph_module.get_submodule("unet").named_children()}
    for node in graph_module.graph.nodes:
        if node.op == "output":
            continue
        time = node.meta.get("binding_time")
        if not isinstance(time, BindingTime) or "recomputed" not in node.meta:
            raise VerificationError(f"'{node.name}' ({node.target}) is not labeled with its binding time and cut")
        if not isinstance(node.meta["val"], Tensor | tuple | list):
            continue  # a size is known as soon as the shape is
        allowed = _MAY_READ[time]
        if time is BindingTime.KEY:
            if node.meta["recomputed"]:
                allowed = allowed & _ONCE_PER_GROUP
            elif module_path(node).split(".")[0] not in owners:
                allowed = allowed - {BindingTime.STEP}
        for source in node.all_input_nodes:
            if source.meta["binding_time"] not in allowed:
                late = f"'{source.name}' [{source.meta['binding_time']}]"
                raise VerificationError(f"'{node.name}' is labeled [{time}], earlier than {late}, which it reads")


FACTS: Mapping[str, Callable[[fx.GraphModule], None]] = {
    "functional": _is_functional,
    "simple": _is_simple,
    "bound": _is_bound,
}
"""Facts that passes require and ensure, with their checks. A fact holds after the pass that ensures it."""


def verify_values(graph_module: fx.GraphModule, names: Collection[str]) -> None:
    """Checks the metadata of the nodes `names` by running their operations on their inputs' metadata.

    Raises:
        VerificationError: naming the first node whose metadata is wrong.
    """
    with FakeTensorMode(), torch.no_grad():
        for node in graph_module.graph.nodes:
            if node.name not in names or node.op != "call_function":
                continue
            arguments, keywords = fx.node.map_arg((node.args, node.kwargs), lambda source: _example(source.meta["val"]))
            made, said = node.target(*arguments, **keywords), _example(node.meta["val"])
            if _types(made) != _types(said):
                raise VerificationError(
                    f"'{node.name}' ({node.target}) is {_types(made)}, but its metadata says {_types(said)}"
                )


_BATCH = 3
"""Batch size for which metadata is compared, unlikely to be equal to another size of a graph."""


def _example(value: Any) -> Any:
    """A fake tensor or number as the metadata `value` describes it, with numbers for symbols."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return concrete_shape(leaf, _BATCH).empty()
        return concrete_size(leaf, _BATCH) if isinstance(leaf, torch.SymInt) else leaf

    return pytree.tree_map(of_leaf, value)


def _types(value: Any) -> list[Any]:
    leaves = pytree.tree_leaves(value)
    return [concrete_shape(leaf, _BATCH) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def verify_program(program: StagedProgram) -> None:
    """Checks a staged program: stages in order, each input known before its stage runs, the output produced.

    Values of the previous group are known, and so are the weights of the forecast.

    Raises:
        VerificationError: naming the stage and the value.
    """
    names = list(program.stages)
    if names != sorted(names, key=STAGE_ORDER.index):
        raise VerificationError(f"stages {names} are not in the order {STAGE_ORDER}")
    known = {value.name for value in program.inputs}
    for stage in program.stages.values():
        stage.graph_module.graph.lint()
        if missing := [value.name for value in stage.inputs if value.name not in known]:
            raise VerificationError(f"stage '{stage.name}' reads {missing}, which nothing before it produces")
        if not stage.outputs:
            raise VerificationError(f"stage '{stage.name}' has no output")
        known |= {value.name for value in stage.outputs}
        known |= {FORECAST_WEIGHT, *(name for name, feature in program.features_before.items() if feature in known)}
    if program.output not in known:
        raise VerificationError(f"no stage produces the output '{program.output}'")
