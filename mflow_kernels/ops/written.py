"""Which arguments of a Triton kernel it writes, read from its source."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def written_arguments(kernel: Any) -> tuple[bool, ...]:
    """For each argument of a kernel, whether a `tl.store` in it, or in a function that it calls,
    has an address that was computed from this argument."""
    function: Callable[..., Any] = getattr(kernel, "fn", kernel)  # Triton wraps it
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    names = [argument.arg for argument in tree.args.args]
    behind: dict[str, set[str]] = {
        name: set() for name in names
    }  # names that a variable is made of
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (name for target in targets for name in _addresses(target)):
                behind.setdefault(name, set()).update(_addresses(node.value))
    written: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for name in (
                name for address in _stored(node, function) for name in _addresses(address)
            ):
                written |= _closure(name, behind)
    return tuple(name in written for name in names)


def _stored(call: ast.Call, function: Callable[..., Any]) -> list[ast.expr]:
    """The arguments of a call that are addresses of stores."""
    if isinstance(call.func, ast.Attribute):
        return call.args[:1] if call.func.attr.startswith("store") else []
    called = function.__globals__.get(call.func.id) if isinstance(call.func, ast.Name) else None
    if not inspect.isfunction(getattr(called, "fn", called)):
        return []
    pairs = zip(call.args, written_arguments(called), strict=False)  # others are named
    return [argument for argument, is_written in pairs if is_written]


def _addresses(expression: ast.AST) -> set[str]:
    """The names in an expression, without those that are only loaded from."""
    if isinstance(expression, ast.Name):
        return {expression.id}
    if isinstance(expression, ast.Call) and getattr(expression.func, "attr", "") == "load":
        return set()
    return {name for child in ast.iter_child_nodes(expression) for name in _addresses(child)}


def _closure(name: str, behind: dict[str, set[str]]) -> set[str]:
    found, waiting = {name}, [name]
    while waiting:
        new = behind.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found
