"""Label each value with its binding time."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from fdcompile.graph.program import BindingTime, module_path

_CURRENT = {BindingTime.LATENT, BindingTime.STEP}
_STEPWISE = {BindingTime.SCHEDULE, BindingTime.SCHEDULE_PROMPT}


def bind(graph_module: fx.GraphModule, recompute: Collection[str]) -> bool:
    """Writes every node's binding time to ``node.meta["binding_time"]`` and its cut to ``node.meta["recomputed"]``.

    A node's time is the join of its inputs' times. The cut `recompute` (module paths) is the only decision: a node of
    any other module that reads the latent is computed at key steps and its value is reused; a recomputed node runs at
    every step, unless it reads nothing that changes within a group, in which case once per key step is exact.
    Operations outside the UNet's weighted children (its own level, ``conv_act``) belong to no cut: they follow what
    they read.

    Before::

        %sample [latent]   %timestep [schedule]   %text [prompt]
        %down : conv2d(%sample, …)          # down_blocks.0
        %temb : linear(%timestep, …)        # up_blocks.0.resnets.0.time_emb_proj
        %conv1 : conv2d(%down, …)           # up_blocks.0.resnets.0.conv1
        %add : add(%conv1, %temb)           # up_blocks.0.resnets.0

    After, with ``up_blocks`` recomputed::

        %down [key]   %temb [schedule]   %conv1 [key]   %add [step]

    Requires: a graph captured with the UNet as its submodule ``unet``; placeholders carry their binding time.
    Ensures: every node carries one. It changes no operation.
    """
    modified = False
    owners = {name for name, _ in graph_module.get_submodule("unet").named_children()}
    for node in graph_module.graph.nodes:
        path = module_path(node)
        before = node.meta.get("recomputed", False), node.meta.get("binding_time")
        node.meta["recomputed"] = any(path == prefix or path.startswith(prefix + ".") for prefix in recompute)
        if node.op != "placeholder":
            node.meta["binding_time"] = _binding_time(node, owned=path.split(".")[0] in owners)
        modified |= before != (node.meta["recomputed"], node.meta["binding_time"])
    return modified


def _binding_time(node: fx.Node, owned: bool) -> BindingTime:
    # The size of a tensor is known as soon as its shape is, whatever is in it.
    if not isinstance(node.meta.get("val"), torch.Tensor | tuple | list):
        return BindingTime.STATIC
    times = {source.meta["binding_time"] for source in node.all_input_nodes} - {BindingTime.STATIC}
    if not times:
        return BindingTime.STATIC
    if not times & {*_CURRENT, BindingTime.KEY}:
        return times.pop() if len(times) == 1 else BindingTime.SCHEDULE_PROMPT
    if node.meta["recomputed"]:
        return BindingTime.STEP if times & {*_CURRENT, *_STEPWISE} else BindingTime.KEY
    if owned:
        return BindingTime.KEY
    if BindingTime.STEP in times:
        return BindingTime.STEP
    return BindingTime.LATENT if times == {BindingTime.LATENT} else BindingTime.KEY
