"""Does a cut compute anything fresh?"""

from __future__ import annotations

from torch import fx

from fdcompile.graph.program import BindingTime, StagedProgram, module_path


def check_cut(program: StagedProgram, fresh: tuple[str, ...]) -> None:
    """Refuses a cut with modules that would be computed at every step without any effect on the prediction.

    What a fresh module computes has one only along a way of fresh values to the prediction: a module that is not fresh
    reads it at key steps, when it would have been computed anyway.

    Raises:
        ValueError: naming such a module and its reader, or the first module of a cut in which nothing is fresh at all.
    """
    nodes = list(program.graph_module.graph.nodes)
    effective = _sources(nodes[-1].all_input_nodes[0])
    for path in fresh:
        own = {node for node in nodes if _stepwise(node) and f"{module_path(node)}.".startswith(f"{path}.")}
        if own and not own & effective:
            raise ValueError(
                f"fresh={list(fresh)}: {path!r} would be computed at every step for nothing: {_reader(nodes, own)!r} "
                f"reads it at key steps only. Make that fresh as well, and what reads it, or leave {path!r} out"
            )
    if fresh and not effective:
        raise ValueError(
            f"fresh={list(fresh)}: {fresh[0]!r} reads nothing that is computed at every step, so nothing would be: "
            f"make fresh what it reads as well, or give fresh=() to reuse the whole output"
        )


def _stepwise(node: fx.Node) -> bool:
    return node.meta.get("binding_time") is BindingTime.STEP


def _sources(output: fx.Node) -> set[fx.Node]:
    """What is computed at every step for `output`, along values that are."""
    found: set[fx.Node] = set()
    pending = [output]
    while pending:
        node = pending.pop()
        if node not in found and _stepwise(node):
            found.add(node)
            pending += node.all_input_nodes
    return found


def _reader(nodes: list[fx.Node], sources: set[fx.Node]) -> str:
    """The first module that reads `sources`, or what is computed from them at every step, and is not fresh itself."""
    reached = set(sources)
    for node in nodes:
        if reached.intersection(node.all_input_nodes):
            if not _stepwise(node):
                return module_path(node)
            reached.add(node)
    raise AssertionError("a value that nothing reads is no part of a captured graph")
