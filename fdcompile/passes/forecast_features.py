"""Forecast the features that the decoder reads from those of the last two key steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fdcompile.graph.program import BEFORE, FORECAST_WEIGHT, BindingTime, Stage, StagedProgram

aten = torch.ops.aten


def forecast_features(program: StagedProgram) -> bool:
    """Makes the decoder read ``c_0 * f + c_1 * f_before`` instead of each feature ``f``, with ``c_0 + c_1 = 1``.

    ``f_before`` is the same feature at the key step before, and `FORECAST_WEIGHT` is ``c_1``, another at each step:
    two more kinds of inputs, which the executor provides. A program that reuses its whole output gets a decoder
    that is nothing but the output's forecast.

    Correctness: with ``c_1 = 0`` it changes nothing, bit for bit, because the sum is taken as ``f + c_1 *
    (f_before - f)``. That form also keeps half precision: what is rounded is the weight of a difference, not two large
    terms that almost cancel. The weights are chosen elsewhere.

    Before::

        %h [key]   %temb [schedule]
        %add : add(%h, %temb)

    After::

        %h [key]   %temb [schedule]   %h_before [key before]   %forecast_weight [schedule]
        %sub : sub(%h_before, %h)
        %mul : mul(%sub, %forecast_weight)
        %add_1 : add(%h, %mul)
        %add : add(%add_1, %temb)

    Requires: `partition`, so that it forecasts what `split_skips` has left of a skip. Ensures: sizes are still read
    from ``f``; features that are not floating point numbers are held.
    """
    decoder = program.stages.get("decoder") or _reading_the_output(program)
    features = [value for value in decoder.inputs if value.time is BindingTime.KEY and value.dtype.is_floating_point]
    if not features:
        return False
    graph = decoder.graph_module.graph
    placeholders = graph.find_nodes(op="placeholder")
    nodes = {node.name: node for node in placeholders}
    with graph.inserting_before(placeholders[-1].next):
        before = [_input(graph, value.name + BEFORE, nodes[value.name].meta["val"]) for value in features]
        weight = _input(graph, FORECAST_WEIGHT, before[0].meta["val"].new_empty(()))
        for value, held in zip(features, before, strict=True):
            _forecast(graph, nodes[value.name], held, weight)
    decoder.graph_module.recompile()
    inputs = (
        *decoder.inputs,
        *(replace(value, name=value.name + BEFORE, time=BindingTime.KEY_BEFORE) for value in features),
        replace(features[0], name=FORECAST_WEIGHT, shape=(), time=BindingTime.SCHEDULE),
    )
    program.stages["decoder"] = replace(decoder, inputs=inputs)
    program.output = decoder.outputs[0].name
    return True


def _reading_the_output(program: StagedProgram) -> Stage:
    """A decoder that returns the output of an earlier stage."""
    values = [value for stage in program.stages.values() for value in stage.outputs]
    prediction = next(value for value in values if value.name == program.output)
    outputs: Any = program.graph_module.graph.output_node().args[0]
    graph = fx.Graph()
    graph.output((_input(graph, prediction.name, outputs[0].meta["val"]),))
    module = fx.GraphModule({}, graph, class_name="decoder")
    forecast = replace(prediction, name="forecast", time=BindingTime.STEP)
    return Stage((prediction,), (forecast,), "decoder", module)


def _input(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    node = graph.placeholder(name)
    node.meta = {"val": value}
    return node


def _forecast(graph: fx.Graph, feature: fx.Node, before: fx.Node, weight: fx.Node) -> None:
    """Replaces the uses of `feature`'s values by their forecast."""
    readers = [user for user in feature.users if user.target is not aten.sym_size.int]
    difference = graph.call_function(aten.sub.Tensor, (before, feature))
    change = graph.call_function(aten.mul.Tensor, (difference, weight))
    forecast = graph.call_function(aten.add.Tensor, (feature, change))
    for node in (difference, change, forecast):
        node.meta = {"val": feature.meta["val"]}
    for reader in readers:
        reader.replace_input_with(feature, forecast)
