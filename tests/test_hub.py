"""The operators as a kernel of the Hugging Face hub, made from the same files.

    python tests/test_hub.py FOLDER

writes a project of kernel-builder into FOLDER: `build.toml` of edition 5, the modules in
`torch-ext/`, a card and a benchmark; and in `build/torch-universal` what kernel-builder makes of a
kernel without compiled code. The modules are the files of `mflow_kernels.ops` with relative
imports. Their operators have a namespace with a digest of the files, so that one process can load
several versions, also beside the package. They need only torch, which brings Triton, and the
standard library. csrc is left out, so the references compute states on a CPU.
"""

import ast
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from own_process import run_python

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mflow_kernels"
NAME = "mflow-kernels"
RELATIVE = (  # imports of the package, and the same from inside one folder
    (r"^( *)from mflow_kernels\.ops import", r"\1from . import"),
    (r"^( *)from mflow_kernels\.(?:ops\.)?(\w+) import", r"\1from .\2 import"),
    (r'import_module\("mflow_kernels\._C"\)', 'import_module("._C", __package__)'),
    (r'f"mflow::([^"]*)"', r'add_op_namespace_prefix(f"\1")'),
)
BUILD = f"""[general]
name = "{NAME}"
version = 1
edition = 5
license = "MIT"
backends = ["cuda"]

[torch-noarch]
"""
CARD = f"""---
library_name: kernels
license: mit
tags: [normalizing-flows, triton]
---

The operators of mflow_kernels, fused Triton kernels for normalizing flows: actnorm, invertible 1x1
convolutions, affine and spline couplings, their inverses and gradients.

```python
from kernels import get_local_kernel

ops = get_local_kernel(FOLDER, "{NAME.replace("-", "_")}")
y, logdet = ops.affine_coupling(x, params)
```

On a CPU the references compute. No GPU has run the kernels yet, so no speed is claimed.
"""
BENCHMARK = """import torch
from kernels.benchmark import Benchmark


class CouplingBenchmark(Benchmark):
    seed = 0

    def setup(self):
        self.x = torch.randn(32, 12, 32, 32, device=self.device)
        self.params = torch.randn_like(self.x)
        self.out = torch.empty_like(self.x)

    def benchmark_affine_coupling(self):
        self.out = self.kernel.affine_coupling(self.x, self.params)[0]

    def verify_affine_coupling(self):
        x_a, x_b = self.x.chunk(2, 1)
        raw, shift = self.params.chunk(2, 1)
        return torch.cat([x_a, (x_b + shift) * raw.tanh().exp()], 1)
"""


def write_layout(folder: Path) -> Path:
    """Write the project into `folder`, and return the folder of its built modules."""
    texts = {}
    for path in sorted([*(PACKAGE / "ops").glob("*.py"), PACKAGE / "version.py"]):
        text = path.read_text()
        for absolute, relative in RELATIVE:
            text = re.sub(absolute, relative, text, flags=re.MULTILINE)
        if "add_op_namespace_prefix" in text:  # kernel-builder makes the module that has it
            first = text.index("\nimport ") + 1
            text = f"{text[:first]}from ._ops import add_op_namespace_prefix\n{text[first:]}"
        texts[path.name] = text
    digest = hashlib.sha256("".join(texts.values()).encode()).hexdigest()[:7]
    namespace = f"_mflow_kernels_{digest}"
    prefix = (
        f'def add_op_namespace_prefix(name: str) -> str:\n    return f"{namespace}::{{name}}"\n'
    )
    metadata: dict[str, Any] = {"id": namespace, "name": NAME, "version": 1, "license": "MIT"}
    metadata |= {"python-depends": [], "backend": {"type": "cuda"}}
    source, built = Path("torch-ext", NAME.replace("-", "_")), Path("build", "torch-universal")
    files = {
        Path("build.toml"): BUILD,
        Path("CARD.md"): CARD,
        Path("benchmarks", "benchmark_coupling.py"): BENCHMARK,
        built / "_ops.py": prefix,
        built / "metadata.json": json.dumps(metadata, indent=2) + "\n",
        **{part / file: text for part in (source, built) for file, text in texts.items()},
    }
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    return folder / built


LOAD = """
import importlib.util, sys, torch
def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path + "/__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
ops = load("hub_kernel", sys.argv[1])
assert not [name for name in sys.modules if name.partition(".")[0] == "mflow_kernels"]
x, params = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3, requires_grad=True)
y, logdet = ops.affine_coupling(x, params)
(y.sum() + logdet.sum()).backward()
from mflow_kernels import ops as package
again = params.detach().requires_grad_()
expected, expected_logdet = package.affine_coupling(x, again)
(expected.sum() + expected_logdet.sum()).backward()
torch.testing.assert_close(y, expected)
torch.testing.assert_close(params.grad, again.grad)
assert sorted(ops.__all__) == sorted(package.__all__)
namespaces = {str(op).partition("::")[0] for op in torch._C._dispatch_get_all_op_names()
              if str(op).endswith("::affine_coupling")}
assert namespaces == {"mflow", sys.argv[2]}, namespaces
"""


def test_the_layout_loads_alone_and_beside_the_package(tmp_path: Path) -> None:
    modules = write_layout(tmp_path)
    name = json.loads((modules / "metadata.json").read_text())["id"]
    done = run_python("-c", LOAD, str(modules), name)
    assert done.returncode == 0, done.stderr


def test_its_imports_are_relative_or_of_torch_triton_and_the_standard_library(
    tmp_path: Path,
) -> None:
    allowed = {"torch", "triton", "typing_extensions"} | sys.stdlib_module_names  # torch has these
    for path in write_layout(tmp_path).glob("*.py"):
        found = re.findall(r"^ *(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE)
        assert {n.partition(".")[0] for n in found if n[0] != "."} <= allowed, path.name


# The schema of edition 5, as kernel-builder reads it (kernels-data/src/config/v5.rs), for a kernel
# without compiled code: the type of each field, and whether it is required.
GENERAL = {
    "name": (str, True), "version": (int, True), "edition": (int, True), "license": (str, True),
    "backends": (list, True), "upstream": (str, False), "source": (str, False),
    "minver": (str, False), "cuda": (dict, False), "hub": (dict, False),
    "kernel-depends": (list, False), "neuron": (dict, False), "python-depends": (list, False),
    "tpu": (dict, False), "xpu": (dict, False),
}  # fmt: skip
TORCH_NOARCH = dict.fromkeys(("pyext", "cuda_capabilities", "rocm_archs"), (list, False))
BACKENDS = {"cann", "cpu", "cuda", "metal", "neuron", "rocm", "tpu", "xpu"}


def assert_schema(build: dict[str, Any]) -> None:
    """Unknown fields are errors, as in kernel-builder."""
    assert {"general", "torch-noarch"} <= build.keys() <= {"general", "torch-noarch", "kernel"}
    for table, fields in (("general", GENERAL), ("torch-noarch", TORCH_NOARCH)):
        assert build[table].keys() <= fields.keys(), table
        for name, (kind, required) in fields.items():
            assert not required or name in build[table], name
            assert isinstance(build[table].get(name, kind()), kind), name
    assert build["general"]["edition"] == 5
    assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", build["general"]["name"])
    assert set(build["general"]["backends"]) <= BACKENDS


def test_the_project_is_one_of_kernel_builder(tmp_path: Path) -> None:
    built = write_layout(tmp_path)
    assert_schema(tomllib.loads((tmp_path / "build.toml").read_text()))
    with pytest.raises(AssertionError):
        assert_schema(tomllib.loads(BUILD.replace("license", "licence")))
    with pytest.raises(AssertionError):
        assert_schema(tomllib.loads(BUILD.replace("edition = 5", "edition = 4")))
    source = tmp_path / "torch-ext" / NAME.replace("-", "_")
    made = {"_ops.py", "metadata.json"}  # by kernel-builder
    assert {p.name for p in source.iterdir()} | made == {p.name for p in built.iterdir()}
    assert "mflow::" not in "".join(re.sub(r'""".*?"""', "", p.read_text(), flags=re.DOTALL)
                                    for p in source.iterdir())  # fmt: skip
    card = (tmp_path / "CARD.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\nlicense: mit\n")
    (script,) = (tmp_path / "benchmarks").glob("benchmark*.py")
    names = {node.name for node in ast.walk(ast.parse(script.read_text()))
             if isinstance(node, ast.FunctionDef)}  # fmt: skip
    assert {"setup", "benchmark_affine_coupling", "verify_affine_coupling"} <= names


def test_the_benchmarks_reference_is_the_operators() -> None:
    """`kernels benchmark` compares the two; here a stand-in for its class does."""
    import torch

    from mflow_kernels import ops

    class Benchmark:
        device, kernel = "cpu", ops

    names: dict[str, Any] = {"torch": torch, "Benchmark": Benchmark}
    exec(BENCHMARK.replace("from kernels.benchmark import Benchmark\n", ""), names)
    run = names["CouplingBenchmark"]()
    run.setup()
    run.benchmark_affine_coupling()
    torch.testing.assert_close(run.out, run.verify_affine_coupling())


if __name__ == "__main__":
    print(write_layout(Path(sys.argv[1])))
