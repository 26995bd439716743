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
    made_of: dict[str, set[str]] = {}  # a variable, and the names that it is computed from
    written: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and node.value:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in _addresses(target):
                    made_of.setdefault(name, set()).update(_addresses(node.value))
        elif isinstance(node, ast.Call):
            written.update(*map(_addresses, _stored(node, function)))
    while not written >= (more := set().union(*(made_of.get(name, ()) for name in written))):
        written |= more
    return tuple(argument.arg in written for argument in tree.args.args)


def _stored(call: ast.Call, function: Callable[..., Any]) -> list[ast.expr]:
    """The arguments of a call that are addresses of stores."""
    if isinstance(call.func, ast.Attribute):
        in_module = isinstance(call.func.value, ast.Name) and call.func.value.id in ("tl", "gl")
        return call.args[:1] if in_module and call.func.attr.startswith("store") else []
    called = function.__globals__.get(call.func.id) if isinstance(call.func, ast.Name) else None
    called_function = getattr(called, "fn", called)
    if not inspect.isfunction(called_function) or called_function.__module__.startswith("triton"):
        return []
    pairs = zip(call.args, written_arguments(called), strict=False)  # others are named
    return [argument for argument, is_written in pairs if is_written]


def _addresses(expression: ast.AST) -> set[str]:
    """The names in an expression, without those that are only loaded from."""
    if isinstance(expression, ast.Name):
        return {expression.id}
    if isinstance(expression, ast.Call) and getattr(expression.func, "attr", "") == "load":
        return set()
    return set().union(*map(_addresses, ast.iter_child_nodes(expression)))
