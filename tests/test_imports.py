"""Modules of the package import only downwards, and never in a circle."""

import ast
import graphlib
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import mflow_kernels

ROOT = Path(mflow_kernels.__file__).parent
# The packages from the bottom up, as in docs/architecture.md.
PACKAGES = ["ops", "reversible", "layers", "models", "interop", "data", "runs", "evaluation"]
PACKAGES += ["training"]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imported(path: Path, *, lazily: bool) -> Iterator[str]:
    """Yield the modules that a module imports when it is loaded, or for type checkers.

    With `lazily`, also yield those that its functions import.
    """
    found = [ast.parse(path.read_text())]
    while found:
        node = found.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in MODULES else node.module for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif lazily or not isinstance(node, ast.FunctionDef):
            found += ast.iter_child_nodes(node)


# The top level imports names of subpackages when they are first used.
def graph(*, lazily: bool) -> dict[str, set[str]]:
    return {
        name: {o for o in imported(path, lazily=lazily) if o in MODULES and o != name}
        for name, path in MODULES.items()
        if name != "mflow_kernels"
    }


@pytest.mark.parametrize("lazily", [False, True], ids=["when loaded", "in functions too"])
def test_no_module_imports_itself_through_others(lazily: bool) -> None:
    """A circle raises CycleError, which lists its modules."""
    graphlib.TopologicalSorter(graph(lazily=lazily)).prepare()


def test_packages_import_only_those_below_them() -> None:
    height = {f"mflow_kernels.{package}": i for i, package in enumerate(PACKAGES)}
    for name, others in graph(lazily=False).items():
        package = ".".join(name.split(".")[:2])
        above = {
            other
            for other in others
            if height.get(".".join(other.split(".")[:2]), -1) > height.get(package, len(PACKAGES))
        }
        assert not above, f"{name} imports {above}"


def test_benchmarks_find_what_they_import() -> None:
    """Importing a module of reports changes Triton; their own tests run them."""
    root = Path(__file__).parent.parent
    for path in sorted((root / "benchmarks").rglob("*.py")):
        if "reports" not in path.parts and path.stem != "conftest":
            importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))


@pytest.mark.parametrize("package", ["ops", "reversible", "layers", "models", "interop"])
def test_torch_2_9_can_trace_every_isinstance(package: str) -> None:
    """The compiler of torch 2.9 accepts a tuple of classes, but no union."""
    for name, path in MODULES.items():
        if name.startswith(f"mflow_kernels.{package}"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                    assert not isinstance(node.args[1], ast.BinOp), f"{path}:{node.lineno}"
