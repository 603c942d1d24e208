"""Cut the labeled graph into stages."""

from __future__ import annotations

import torch
from torch import fx

from fdcompile.graph.program import STAGE_ORDER, BindingTime, Stage, StagedProgram, TensorSpec

_STAGE_OF = {
    BindingTime.SCHEDULE: "schedule",
    BindingTime.PROMPT: "prompt",
    BindingTime.SCHEDULE_PROMPT: "schedule_prompt",
    BindingTime.KEY: "encoder",
}


def partition(graph_module: fx.GraphModule) -> StagedProgram:
    """Moves every operation to the stage of its binding time and names what crosses the borders.

    A stage takes the values it reads from the UNet's inputs and from earlier stages. Cheap values (static ones,
    sizes, weight-free arithmetic on the latent) are recomputed in each stage that reads them. If a reused module reads
    a recomputed one, the encoder stage also computes that one at the key step. The batch size is read from a tensor the
    stage has anyway, so that a stage never needs the latent for its shape alone.

    Correctness: every stage is a subgraph in topological order whose free variables are its inputs; run in
    `STAGE_ORDER` at one step the stages compute the captured graph operation by operation.

    Before::

        %size : sym_size(%sample, 0)        %down [key] : conv2d(%sample, …)
        %temb [schedule] : linear(%time)    %out [step] : view(add(%down, %temb), [%size, …])

    After::

        schedule(time) -> temb    encoder(sample) -> down
        decoder(down, temb) -> out, with %size : sym_size(%down, 0)

    Requires: `bind`. Ensures: stages in `STAGE_ORDER`, each used, with flat tensor inputs and a tuple of outputs.
    """
    nodes = list(graph_module.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    sample = next(node for node in placeholders if node.meta["binding_time"] is BindingTime.LATENT)
    stage_of = _assign(nodes)
    builders = {
        name: _StageBuilder(name, graph_module, stage_of) for name in STAGE_ORDER if name in set(stage_of.values())
    }
    for builder in builders.values():
        builder.build([node for node in nodes if stage_of.get(node) == builder.name])
    (output,) = nodes[-1].args[0]
    wanted = {output}
    stages: dict[str, Stage] = {}
    for name, builder in reversed(builders.items()):
        if outputs := [node for node in nodes if node in wanted and stage_of.get(node) == name]:
            stages[name] = builder.finish(outputs, sample)
            wanted |= set(builder.inputs)
    inputs = tuple(TensorSpec.of(node, sample) for node in placeholders)
    return StagedProgram(inputs, dict(reversed(stages.items())), output.name, graph_module)


def _assign(nodes: list[fx.Node]) -> dict[fx.Node, str]:
    stage_of: dict[fx.Node, str] = {}

    def is_feature(node: fx.Node) -> bool:
        held = node.op == "placeholder" and node.meta["binding_time"] is BindingTime.KEY
        return held or stage_of.get(node) in ("encoder", "decoder")

    for node in nodes:
        if node.op in ("placeholder", "output"):
            continue
        time = node.meta["binding_time"]
        if time is BindingTime.STEP:
            after_features = any(map(is_feature, node.all_input_nodes))
            stage_of[node] = "decoder" if after_features else "shallow"
        elif time in _STAGE_OF:
            stage_of[node] = _STAGE_OF[time]
    return stage_of


class _StageBuilder:
    """Copies the nodes of one stage into a new graph."""

    def __init__(self, name: str, source: fx.GraphModule, stage_of: dict[fx.Node, str]) -> None:
        self.name = name
        self.inputs: dict[fx.Node, fx.Node] = {}
        self._source = source
        self._stage_of = stage_of
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}

    def build(self, nodes: list[fx.Node]) -> None:
        for node in self._free_variables(nodes):
            placeholder = self._graph.placeholder(node.name)
            placeholder.meta = dict(node.meta)
            self.inputs[node] = self._copies[node] = placeholder
        for node in nodes:
            self._copy(node)

    def _is_input(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return True
        producer = self._stage_of.get(node)
        return producer is not None and STAGE_ORDER.index(producer) < STAGE_ORDER.index(self.name)

    def _free_variables(self, nodes: list[fx.Node]) -> list[fx.Node]:
        free: dict[fx.Node, None] = {}
        seen: set[fx.Node] = set()
        pending = list(reversed(nodes))
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if self._is_input(node):
                free[node] = None
            elif _is_tensor(node):
                pending += reversed(node.all_input_nodes)
        return list(free)

    def _copy(self, node: fx.Node) -> fx.Node:
        if node not in self._copies:
            self._copies[node] = self._size(node) or self._graph.node_copy(node, self._copy)
        return self._copies[node]

    def _size(self, node: fx.Node) -> fx.Node | None:
        """Reads the size `node` from an input of this stage; None if no input has it."""
        if _is_tensor(node) or not isinstance(node.meta.get("val"), torch.SymInt):
            return None
        for source, placeholder in self.inputs.items():
            for dim, size in enumerate(source.meta["val"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr == node.meta["val"].node.expr:
                    copy = self._graph.call_function(torch.ops.aten.sym_size.int, (placeholder, dim))
                    copy.meta = {"val": node.meta["val"], "binding_time": BindingTime.STATIC}
                    return copy
        return None

    def finish(self, outputs: list[fx.Node], sample: fx.Node) -> Stage:
        self._graph.output(tuple(self._copies[node] for node in outputs))
        self._graph.eliminate_dead_code()
        module = fx.GraphModule(self._source, self._graph, class_name=self.name)
        inputs, returned = (tuple(TensorSpec.of(node, sample) for node in nodes) for nodes in (self.inputs, outputs))
        return Stage(inputs, returned, self.name, module)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor | tuple | list)
