"""Benchmarks check results first, interleave variants, and measure peaks in fresh processes."""

import dataclasses
import os
import time

import pytest
import torch
from torch import Tensor

from benchmarks.bench_ops import OPERATIONS, measure
from benchmarks.harness import session
from benchmarks.harness.measurements import interleaved, peak_bytes
from benchmarks.harness.models import Model, Spec
from benchmarks.harness.operators import Function, Shape, operations
from benchmarks.harness.processes import Died, Late, in_fresh_processes
from benchmarks.harness.session import Bench, Measured, Missing, slug
from mflow_kernels.ops.coupling_network import layer
from mflow_kernels.testing import tolerance

CPU = torch.device("cpu")
SHAPE = Shape(16, 1, 2, True)


def bench() -> Bench:
    return Bench(CPU, "tiny", "wall", 1, {"copy_bytes_per_second": 1e10}, float("inf"), None)


def operation(name: str, direction: str):
    return next(op for op in operations(SHAPE, CPU) if (op.name, op.direction) == (name, direction))


def test_every_operator_agrees_with_its_reference() -> None:
    """Benchmarks only; the operators' own tests cover more shapes."""
    found = list(operations(SHAPE, CPU))
    assert {(op.name, op.direction) for op in found} == set(OPERATIONS)
    for op in found:
        op.check(op.function, op.exact())


def test_the_fewest_bytes_follow_from_inputs_and_results() -> None:
    n, c, p = SHAPE.n, SHAPE.c, SHAPE.p
    state, vector, logdet = 4 * n * c * p, 4 * c, 4 * n
    assert operation("actnorm", "forward").fewest == 2 * state + 2 * vector + logdet
    assert operation("actnorm", "backward").fewest == 3 * state + 4 * vector + logdet
    # The gradient of a coupling reads the half of x that the coupling changed. params are as large
    # as a state here.
    assert operation("affine_coupling", "backward").fewest == 4.5 * state + logdet
    assert operation("rebuild_conv1x1", "backward").fewest == 4 * state + 8 * c * c + 2 * vector


def test_a_wrong_operator_is_not_timed() -> None:
    right = operation("affine_coupling", "backward")
    wrong = dataclasses.replace(
        right, function=lambda x, q: tuple(t * (1 + 1e-3) for t in right.function(x, q))
    )
    measured = measure(bench(), wrong, SHAPE, compiles=False)
    assert measured.seconds.keys() == {"eager"}
    with pytest.raises(AssertionError, match="affine_coupling, x: largest error"):
        raise measured.faults["mflow_kernels"]
    assert measured.extra["eager"]["bytes"] == right.fewest


def network_that_cuts_at(share: float) -> Function:
    """A coupling network whose ReLUs pass only what exceeds `share` of the size of its terms."""

    def run(*given: Tensor) -> tuple[Tensor]:
        x, w1, b1, w2, b2, w3, b3 = (t.double() for t in given)
        for w, b in ((w1, b1), (w2, b2)):
            size = layer(x.square(), w.square(), b.square()).sqrt()
            z = layer(x, w, b)
            x = z * (z > share * size)
        return (layer(x, w3, b3).to(given[0].dtype),)

    return run


def test_relus_may_cut_within_rounding_of_zero_and_nowhere_else() -> None:
    """A bound on the rounding of sums does not cover hidden units that change sides."""
    op, rounding = operation("coupling_network", "backward"), 2**-8
    exact = op.exact()
    cuts_near = network_that_cuts_at(rounding)
    op.check(cuts_near, exact)
    error = float((op.prepare(cuts_near)()[0] - exact[0]).abs().max())
    assert error > tolerance(torch.bfloat16, 9 * 512) * max(1.0, float(exact[0].abs().max()))
    for share in (0.25, -0.25):
        with pytest.raises(AssertionError, match=r"coupling_network, x_a: largest error .* slack"):
            op.check(network_that_cuts_at(share), exact)


def test_a_wrong_model_fails_its_check() -> None:
    model = Model(Spec(side=8, levels=2, steps=2, width=8, batch=2), "plain", CPU)
    model.check("train")
    with torch.no_grad():
        next(p for n, p in model.module.named_parameters() if n.endswith("lower")).add_(1e-2)
    with pytest.raises(AssertionError, match="plain: z"):
        model.check("train")


def test_errors_skip_peers_and_fail_this_package(monkeypatch) -> None:
    """A missing peak memory counts as an error."""
    measured = Measured(extra={"plain": {}})
    for name in ("mflow_kernels, stored", "memcnn"):
        measured.fault(name, RuntimeError("no such operator"))
    measured.fault("nflows", AssertionError("off"))
    died = Died("the process died")
    monkeypatch.setattr(session, "in_fresh_processes", lambda *_: [died, died, 8])
    names = ["mflow_kernels, reversible", "FrEIA", "plain"]
    measured.add_peaks(bench(), names, Model, workers=1)
    assert {name: type(fault) for name, fault in measured.faults.items()} == {
        **{"mflow_kernels, stored": RuntimeError, "memcnn": Missing, "nflows": AssertionError},
        **{"mflow_kernels, reversible": RuntimeError, "FrEIA": Missing},
    }
    assert str(measured.faults["memcnn"]) == "memcnn: RuntimeError: no such operator"
    assert measured.extra == {"plain": {"peak_bytes": 8}}


def test_slow_processes_skip_rows_and_fail_none(monkeypatch) -> None:
    (late,) = in_fresh_processes(_fate, ["wait"], workers=1, seconds=0.1)
    assert isinstance(late, Late)
    measured = Measured(extra={"mflow_kernels, stored": {}})
    monkeypatch.setattr(session, "in_fresh_processes", lambda *_: [late])
    measured.add_peaks(bench(), ["mflow_kernels, stored"], Model, workers=1)
    (fault,) = measured.faults.values()
    assert isinstance(fault, Missing)
    assert "no result within 0.1 s" in str(fault)


def test_row_ids_are_words_for_the_k_option() -> None:
    spec = str(Spec(constant=True, precision="bfloat16")).split()
    row = slug(*spec, "train", "mflow_kernels, nothing stored")
    assert row == "B8-3x32x32-L3-K8-constant-networks-bf16-train-mflow_kernels_nothing_stored"


def test_check_does_not_measure() -> None:
    right = operation("actnorm", "forward")
    measured = measure(dataclasses.replace(bench(), check_only=True), right, SHAPE, compiles=False)
    assert not measured.seconds
    assert measured.faults.keys() == {"compiled"}


def test_variants_are_interleaved() -> None:
    order: list[str] = []
    prepares = {name: (lambda name=name: lambda: order.append(name)) for name in "abc"}
    taken = interleaved(prepares, 3, CPU, "wall")
    assert [len(rounds) for rounds in taken.values()] == [3, 3, 3]
    runs = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    # Two calls of each warm up, then each of three rounds starts with another variant.
    assert "".join(runs) == "abc" + "abc" + "bca" + "cab"


def test_the_peak_includes_memory_freed_during_the_call() -> None:
    def call() -> torch.Tensor:
        kept = torch.empty(1 << 18)
        torch.empty(1 << 20)  # freed at once
        return kept

    assert peak_bytes(call, CPU) == 5 * (1 << 20)


def test_a_process_that_dies_or_raises_says_so() -> None:
    dead, raised, returned = in_fresh_processes(
        _fate, ["die", "raise", "return"], workers=3, seconds=3600
    )
    assert isinstance(dead, Died)
    assert "the process died" in str(dead)
    assert "ValueError: no" in str(raised)
    assert returned == "return"


def _fate(what: str) -> str:
    if what == "die":
        os._exit(1)
    if what == "wait":
        time.sleep(60)
    if what == "raise":
        raise ValueError("no")
    return what
