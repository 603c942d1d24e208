"""Checks that every module of a cut has an effect."""

from __future__ import annotations

from torch import fx

from fdcompile.graph.program import BindingTime, StagedProgram, module_path


class CutError(ValueError):
    """A module of a cut has no effect in this UNet."""


def check_cut(program: StagedProgram, recompute: tuple[str, ...]) -> None:
    """Checks that no module of `recompute` is computed at every step without an effect on the prediction.

    A recomputed module has an effect only through a path of recomputed values to the prediction: modules that are not
    recomputed read it at key steps, at which it would be computed anyway.

    Raises:
        CutError: a module has no effect, or nothing would be recomputed. The message names the module.
    """
    nodes = list(program.graph_module.graph.nodes)
    effective = _sources(nodes[-1].all_input_nodes[0])
    for path in recompute:
        inside = {node for node in nodes if _stepwise(node) and f"{module_path(node)}.".startswith(f"{path}.")}
        if inside and not inside & effective:
            raise CutError(
                f"recompute={list(recompute)}: {path!r} would be computed at every step for nothing: "
                f"{_reader(nodes, inside)!r} reads it at key steps only. "
                f"Recompute that as well, and what reads it, or leave {path!r} out"
            )
    if recompute and not effective:
        raise CutError(
            f"recompute={list(recompute)}: {recompute[0]!r} reads nothing that is computed at every step, so nothing "
            f"would be: recompute what it reads as well, or give recompute=() to reuse the whole output"
        )


def _stepwise(node: fx.Node) -> bool:
    return node.meta.get("binding_time") is BindingTime.STEP


def _sources(output: fx.Node) -> set[fx.Node]:
    """Nodes that `output` depends on through nodes that are computed at every step."""
    sources: set[fx.Node] = set()
    pending = [output]
    while pending:
        node = pending.pop()
        if node not in sources and _stepwise(node):
            sources.add(node)
            pending += node.all_input_nodes
    return sources


def _reader(nodes: list[fx.Node], sources: set[fx.Node]) -> str:
    """Path of the first module that is not recomputed and reads `sources` or stepwise values computed from them."""
    reached = set(sources)
    for node in nodes:
        if reached.intersection(node.all_input_nodes):
            if not _stepwise(node):
                return module_path(node)
            reached.add(node)
    raise AssertionError("a value that nothing reads is no part of a captured graph")
