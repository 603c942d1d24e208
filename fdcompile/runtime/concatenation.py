"""Finds the tensors that a pipeline concatenates with its latents, in its source instead of on the device."""

from __future__ import annotations

import ast
import linecache
import sys
import traceback
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType

from torch import Tensor


def concatenated_with(sample: Tensor, axis: int, channels: int) -> tuple[Tensor, ...] | None:
    """Finds the tensors, of `channels` channels in total, that a caller concatenated with its latents to `sample`.

    The caller has a local variable ``x`` that is `sample` and was assigned by ``x = torch.cat([x, mask, image],
    dim=axis)``, as in diffusers' pipelines for inpainting, InstructPix2Pix, depth, upscaling and videos.

    Returns:
        The tensors, or None if there is no such source, or if `sample` was or may have been (an inference tensor)
        written to since.
    """
    if sample.is_inference() or sample._version:
        return None
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        variables = frame.f_locals
        for name in [name for name, value in variables.items() if value is sample]:
            tensors = [variables.get(other) for other in _concatenated(frame.f_code, name, axis, line)]
            others = tuple(tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.ndim == sample.ndim)
            if len(others) == len(tensors) and sum(tensor.shape[axis] for tensor in others) == channels:
                return others
    return None


@lru_cache(maxsize=256)
def _concatenated(code: CodeType, name: str, axis: int, line: int) -> tuple[str, ...]:
    """Names of the variables that are concatenated with local `name` before `line`; empty if the source shows none."""
    function = _function(code)
    if function is None:
        return ()
    before = (node for node in _assignments(function, name) if node.lineno < line)
    last = max(before, default=None, key=lambda node: node.lineno)
    if not isinstance(last, ast.Assign) or _is_alternative(function, last, name):
        return ()
    match last.value:
        case ast.Call(
            func=ast.Attribute(value=ast.Name("torch"), attr="cat"),
            args=[ast.List(elements) | ast.Tuple(elements)],
            keywords=[ast.keyword("dim", ast.Constant(dim))],
        ) if dim == axis and all(isinstance(element, ast.Name) for element in elements):
            names = [element.id for element in elements if isinstance(element, ast.Name)]
            others = tuple(other for other in names if other != name)
            stored = (node for other in others for node in _assignments(function, other))
            replaced = any(last.lineno < node.lineno < line for node in stored)
            return others if names.count(name) == 1 and not replaced else ()
    return ()


def _function(code: CodeType) -> ast.FunctionDef | ast.Module | None:
    """Syntax tree of the source of `code`."""
    try:
        module = ast.parse("".join(linecache.getlines(code.co_filename)))
    except (SyntaxError, ValueError):
        return None
    if code.co_name == "<module>":
        return module
    functions = (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and node.name == code.co_name)
    firsts = ((min([node.lineno, *(each.lineno for each in node.decorator_list)]), node) for node in functions)
    return next((node for first, node in firsts if first == code.co_firstlineno), None)


def _assignments(tree: ast.AST, name: str) -> Iterator[ast.stmt]:
    """Statements that store to `name`, excluding those that only contain such a statement."""
    for statement in ast.walk(tree):
        if isinstance(statement, ast.stmt):
            parts = (child for child in ast.iter_child_nodes(statement) if not isinstance(child, ast.stmt))
            names = (node for part in parts for node in ast.walk(part) if isinstance(node, ast.Name))
            if any(node.id == name and isinstance(node.ctx, ast.Store) for node in names):
                yield statement


def _is_alternative(function: ast.AST, assignment: ast.stmt, name: str) -> bool:
    """Whether `assignment` is in the ``else`` of an ``if`` whose body also stores to `name`."""
    choices = (node for node in ast.walk(function) if isinstance(node, ast.If))
    bodies = (node.body for node in choices if any(assignment in ast.walk(other) for other in node.orelse))
    return any(any(_assignments(statement, name)) for body in bodies for statement in body)
