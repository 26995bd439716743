"""The report of `python -m mflow_kernels.env`, and a package without triton."""

import re
from types import SimpleNamespace

import pytest
import torch
from own_process import run_python

from mflow_kernels import env


def report(monkeypatch: pytest.MonkeyPatch, *missing: str) -> str:
    """The report of a machine that lacks these packages, and a GPU."""
    version = env._version
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(env, "_version", lambda name: None if name in missing else version(name))
    return env.report()


def test_report_names_versions_devices_and_the_extension() -> None:
    done = run_python("-m", "mflow_kernels.env")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mflow_kernels ")
    for name in ("mflow_kernels", "python", "torch", "triton", "devices", "extension", "nvcc"):
        assert re.search(rf"^{name} +\S", done.stdout, re.MULTILINE), name
    assert torch.__version__ in done.stdout


def test_report_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    text = report(monkeypatch, "triton", "lightning", "torchmetrics")
    assert re.search(r"^triton +missing$", text, re.MULTILINE)
    assert "triton: states on a GPU are computed by plain torch without it" in text
    assert "everything runs on the CPU" in text
    line = "  for mflow: lightning, torchmetrics; pip install 'mflow_kernels[train]'"
    assert line in text.splitlines()


def test_report_says_what_the_extension_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    native = SimpleNamespace(cuda_archs=[], cuda_note="left out by MFLOW_CUDA=0", cuda_runtime=0)
    monkeypatch.setattr(env.importlib, "import_module", lambda name: native)
    text = report(monkeypatch)
    assert re.search(r"^extension +CPU; no CUDA: left out by MFLOW_CUDA=0", text, re.MULTILINE)

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(env.importlib, "import_module", missing)
    text = report(monkeypatch)
    assert re.search(r"^extension +missing", text, re.MULTILINE)
    assert "pip install ." in text.split("\nmissing\n")[1]


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises ModuleNotFoundError

import torch
from benchmarks.harness import table
from mflow_kernels import Glow
from mflow_kernels.interop import accelerate
from mflow_kernels.ops import coupling_conv1x1, masked_penalty
from mflow_kernels.ops.coupling_network import coupling_network
from mflow_kernels.testing import check_bijection

glow = Glow((2, 4, 4), levels=2, steps=2, width=4)
check_bijection(glow, (2, 2, 4, 4))
z, logdet = glow(torch.randn(2, 2, 4, 4, requires_grad=True))
(logdet.sum() + masked_penalty(z[0]).sum()).backward()
for operator in table.OPERATORS:
    inputs = operator.draw(table.Draw((2, 4, 3, 5)))
    for got, wanted in zip(operator.call(*inputs.values()), operator.expected(*inputs.values())):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
"""


def test_a_cpu_needs_no_triton() -> None:
    done = run_python("-W", "ignore", "-c", WITHOUT_TRITON)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["sm_80"], (8, 0), True),
        (["sm_80"], (8, 9), True),
        (["sm_89"], (8, 6), False),
        (["sm_80"], (9, 0), False),
        (["sm_80", "compute_80"], (9, 0), True),
        (["sm_100", "compute_100"], (12, 0), True),
        (["sm_100", "compute_100"], (9, 0), False),
        (["sm_90"], (7, 5), False),
    ],
)
def test_which_devices_an_architecture_serves(
    archs: list[str], capability: tuple[int, int], runs: bool
) -> None:
    assert env._runs_on(archs, capability) == runs
