"""In one process, equal small UNets are traced once: most tests begin with the same one, and a trace takes seconds.

Only what nobody has touched is shared: modules of libraries alone, without hooks, adapters or replaced functions.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor, fx, nn

from fdcompile.capture.call import UNetCall
from fdcompile.capture.export import AnySize
from fdcompile.capture.guards.describe import fingerprint, replaced_code, user_state
from fdcompile.capture.guards.support import foreign_hooks, modes
from fdcompile.graph.program import Stage
from fdcompile.graph.weights import copy_of

exporting: Any = importlib.import_module("fdcompile.capture.export")
batching: Any = importlib.import_module("fdcompile.passes.batch_steps")


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    graphs: dict[Any, fx.GraphModule] = {}
    batched: dict[Any, Any] = {}
    real_capture: Callable[..., fx.GraphModule] = exporting.capture
    real_trace_steps = batching.trace_steps

    def capture(
        unet: nn.Module, call: UNetCall, symbolic_batch: bool = True, sizes: AnySize | None = None
    ) -> fx.GraphModule:
        if sizes is not None or call.signature.unknown or not _untouched(unet):
            return real_capture(unet, call, symbolic_batch, sizes)
        tensors = tuple((name, _like(tensor)) for name, tensor in [*unet.named_parameters(), *unet.named_buffers()])
        signature = call.signature if symbolic_batch else call.fixed_signature
        key = (str(unet), str(vars(unet).get("config")), fingerprint(unet), tensors, signature)
        if key not in graphs:
            graph = real_capture(unet, call, symbolic_batch)
            if any(not str(node.target).startswith("unet.") for node in graph.graph.find_nodes(op="get_attr")):
                return graph
            graphs[key] = graph
        holder = nn.Module()
        holder.unet = unet
        return fx.GraphModule(holder, copy_of(graphs[key]).graph)

    def trace_steps(stage: Stage) -> Any:
        names = (str(node.target) for node in stage.graph_module.graph.nodes if node.op == "get_attr")
        weights = [operator.attrgetter(name)(stage.graph_module) for name in names]
        if any(type(weight) not in (Tensor, nn.Parameter) for weight in weights):
            return real_trace_steps(stage)
        code = stage.graph_module.graph.python_code("self").src
        inputs = (tuple(stage.inputs), frozenset(stage.stepwise_inputs), stage.multiple, stage.device)
        key = (code, tuple(map(_like, weights)), inputs, frozenset(batching._WRAPPED))
        if key not in batched:
            batched[key] = real_trace_steps(stage)
        return batched[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "capture", capture)
        patch.setattr(batching, "trace_steps", trace_steps)
        yield


def _like(tensor: Tensor) -> Any:
    return (type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_inference())


def _untouched(unet: nn.Module) -> bool:
    modules = list(unet.modules())
    hooks = any(module._forward_hooks or module._forward_pre_hooks or module.training for module in modules[1:])
    foreign = any(not type(module).__module__.startswith(("torch.nn.", "diffusers.")) for module in modules)
    patched = any("forward" in vars(module) for module in modules[1:])
    state = hooks or foreign or patched or foreign_hooks() or modes() or user_state(unet) or replaced_code(unet)
    return not state
