"""Formats graphs as text with one line per value, like in the docstrings of the passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fdcompile.graph.program import module_path, spell_dtype


def graph_text(graph_module: fx.GraphModule, nodes: Iterable[fx.Node] | None = None) -> str:
    """Formats the values of `graph_module`, or only `nodes`: name, binding time, operation, type, module.

    Weights are written where they are read, as paths relative to the module. ``B`` is the batch size, ``steps`` the
    number of steps.
    """
    names = _size_names(graph_module.graph)
    chosen = graph_module.graph.nodes if nodes is None else nodes
    return "\n".join(_line(node, names) for node in chosen if node.op != "get_attr")


class _Word(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _line(node: fx.Node, names: Mapping[str, str]) -> str:
    path = module_path(node)
    arguments, keywords = fx.node.map_arg((node.args, node.kwargs), lambda source: _Word(_name(source, path)))
    listed = ", ".join([*map(_spell, arguments), *(f"{name}={_spell(value)}" for name, value in keywords.items())])
    if node.op == "output":
        return f"return {listed}"
    time = node.meta.get("binding_time")
    head = f"%{node.name}" if time is None else f"%{node.name} [{time}]"
    about = f"  # {_type(node.meta.get('val'), names)}" + (f" in {path}" if path else "")
    return f"{head} : {'input' if node.op == 'placeholder' else f'{_operation(node)}({listed})'}{about}"


def _name(node: fx.Node, reader: str) -> str:
    if node.op != "get_attr":
        return f"%{node.name}"
    return str(node.target).removeprefix("unet.").removeprefix(f"{reader}.")


def _operation(node: fx.Node) -> str:
    name: str = node.target if isinstance(node.target, str) else node.target.__name__
    return name.removesuffix(".default")


def _spell(argument: Any) -> str:
    return repr(argument).replace("torch.", "")


def _type(value: Any, names: Mapping[str, str]) -> str:
    if isinstance(value, Tensor):
        sizes = ", ".join(_size(size, names) for size in value.shape)
        return f"{spell_dtype(value.dtype)}[{sizes}]"
    if isinstance(value, list | tuple):
        return ", ".join(_type(entry, names) for entry in value)
    return _size(value, names)


def _size(size: Any, names: Mapping[str, str]) -> str:
    if not isinstance(size, torch.SymInt):
        return str(size)
    symbols = {symbol: names.get(str(symbol), str(symbol)) for symbol in size.node.expr.free_symbols}
    return str(size.node.expr.subs(symbols))


def _size_names(graph: fx.Graph) -> dict[str, str]:
    """Names of the symbols in the first sizes of the inputs."""
    names: dict[str, str] = {}
    for node in graph.find_nodes(op="placeholder"):
        meaning = ("steps", "B") if node.meta.get("stepwise") else ("B",)
        sizes = node.meta["val"].shape if isinstance(node.meta.get("val"), Tensor) else ()
        for size, name in zip(sizes, meaning, strict=False):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                names.setdefault(str(size), name)
    return names
