"""What must hold before the first pass and after the last."""

from __future__ import annotations

import torch
from torch import fx

from fdcompile.graph.program import FORECAST_WEIGHT, STAGE_ORDER, BindingTime, StagedProgram


class VerificationError(RuntimeError):
    """A graph or a program is malformed; the message names the node or the stage."""


def verify_graph(graph_module: fx.GraphModule) -> None:
    """Checks a captured graph: well-formed, functional, one tensor output, every input with its binding time.

    Raises:
        VerificationError: naming the first node that breaks a rule.
    """
    graph_module.graph.lint()
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and not isinstance(node.meta.get("binding_time"), BindingTime):
            raise VerificationError(f"input '{node.name}' has no binding time")
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise VerificationError(f"'{node.name}' ({node.target}) writes to its input; stages must be functional")
        if node.op == "output" and len(node.args[0]) != 1:
            raise VerificationError(f"expected one output, the noise prediction, found {len(node.args[0])}")


def verify_program(program: StagedProgram) -> None:
    """Checks a staged program: stages in order, each input known by then, the output produced.

    What was known in the group before is known in the next, and so are the weights of its forecast.

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
