"""The operators as a kernel of the Hugging Face hub, made from the same files.

    python tests/test_hub.py FOLDER

writes FOLDER/build/torch-universal: the files of `mflow_kernels.ops` with relative imports, and a
namespace of operators with a digest of them, so that one process can load several versions, also
beside the package. They need only torch, which brings Triton, and the standard library. csrc is
left out, so the references compute states on a CPU.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

from own_process import run_python

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mflow_kernels"
RELATIVE = (  # imports of the package, and the same from inside one folder
    (r"^( *)from mflow_kernels\.ops import", r"\1from . import"),
    (r"^( *)from mflow_kernels\.(?:ops\.)?(\w+) import", r"\1from .\2 import"),
    (r'import_module\("mflow_kernels\._C"\)', 'import_module("._C", __package__)'),
)


def write_layout(folder: Path) -> Path:
    """Write the layout into `folder`, and return the folder of its modules."""
    texts = {}
    for path in sorted([*(PACKAGE / "ops").glob("*.py"), PACKAGE / "version.py"]):
        texts[path.name] = path.read_text()
        for absolute, relative in RELATIVE:
            texts[path.name] = re.sub(absolute, relative, texts[path.name], flags=re.MULTILINE)
    digest = hashlib.sha256("".join(texts.values()).encode()).hexdigest()[:7]
    name = f"_mflow_kernels_{digest}"
    modules = folder / "build" / "torch-universal"
    modules.mkdir(parents=True)
    for file, text in texts.items():
        (modules / file).write_text(text.replace('f"mflow::', f'f"{name}::'))
    metadata = {"id": name, "name": "mflow-kernels", "version": 1, "license": "MIT"}
    metadata |= {"python-depends": [], "backend": {"type": "cuda"}}
    (modules / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return modules


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


if __name__ == "__main__":
    print(write_layout(Path(sys.argv[1])))
