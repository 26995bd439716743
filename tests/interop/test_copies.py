"""Copies of a library's code, and classes that their owner says are like a library's."""

import importlib.metadata
import importlib.util
import inspect
import sys

import FrEIA.modules as Fm
import pytest
import torch
from torch import nn

from interop import peers
from interop.test_freia import SUB, TESTS, sequence
from mflow_kernels.interop import accelerate


def loaded(path, name, monkeypatch):
    """Import one file as a module of this name, without the package around it."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def network(block, **options):
    torch.manual_seed(0)
    return peers.perturbed(sequence((6,), *[(block, {**SUB, **options})] * 3)).double()


def assert_accelerated(model):
    with peers.default_dtype(torch.float64):
        peers.assert_equals_original(model, TESTS.results(torch.float64), 1)
        peers.assert_equals_original(model, TESTS.results(torch.float64), 1, reversible=True)


@pytest.mark.parametrize("options", [{}, {"permute_soft": True}, {"reverse_permutation": True}])
def test_anomalib(options, monkeypatch):
    try:
        files = importlib.metadata.files("anomalib") or ()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("anomalib is not installed")
    (file,) = (f for f in files if f.match("components/flow/all_in_one_block.py"))
    block = loaded(file.locate(), "anomalib_all_in_one_block", monkeypatch).AllInOneBlock
    assert_accelerated(network(block, **options))


@pytest.mark.parametrize("edit", ["", "# edited"])
def test_a_copied_module_counts_by_its_code(edit, tmp_path, monkeypatch):
    path = tmp_path / "copy.py"
    path.write_text(inspect.getsource(Fm.all_in_one_block) + edit)
    # In this package the relative imports of the original work.
    model = network(loaded(path, f"FrEIA.modules.copy{len(edit)}", monkeypatch).AllInOneBlock)
    if edit:
        assert "no such layer" in str(peers.assert_left_alone(model))
    else:
        assert_accelerated(model)


class Block(Fm.AllInOneBlock):
    """A user's block with the computation of FrEIA's."""


class Doubled(Fm.AllInOneBlock):
    """A user's block that computes something else with the same attributes."""

    def forward(self, x, c=(), rev=False, jac=True):
        (z,), log_det = super().forward(x, c, rev, jac)
        return (z + 1e-6,), log_det


def test_like():
    model = network(Block)
    assert "no such layer" in str(peers.assert_left_alone(model))
    want = model(torch.ones(2, 6).double())
    assert accelerate(model, like={Block: Fm.AllInOneBlock}).replaced
    torch.testing.assert_close(model(torch.ones(2, 6).double()), want)


@pytest.mark.parametrize(
    ("block", "known", "why"),
    [
        (Doubled, Fm.AllInOneBlock, "computes something else than AllInOneBlock"),
        (Block, Fm.GLOWCouplingBlock, "could not be compared with GLOWCouplingBlock"),
    ],
)
def test_unlike_layers_are_left(block, known, why):
    model = network(block)
    report = accelerate(model, like={block: known})
    assert not report.replaced
    assert why in str(report)


def test_like_names_layers_of_freia():
    for like in ({Block: nn.Linear}, {Block: 1}, {"Block": Fm.AllInOneBlock}):
        with pytest.raises(TypeError, match="like: expected classes"):
            accelerate(network(Block), like=like)
