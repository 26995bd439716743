"""What runs in place of kernels that do not compile, do not fit, or are wrong."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DIFFERENTIABLE, FLOW_OPERATORS, sample
from own_process import run_python
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import KernelInterface

from benchmarks.harness.table import OPERATORS
from mflow_kernels import env, ops
from mflow_kernels.ops import agreement, card_files, fallback, launch
from mflow_kernels.ops.launch import use_kernels
from mflow_kernels.testing import assert_close

needs_kernels = pytest.mark.skipif(
    not fallback.HAS_KERNELS, reason="kernels run only in Triton's interpreter here"
)
CPU = torch.device("cpu")


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The CPU stands for a card on which no operator was compared yet. The file of findings."""
    path = tmp_path / "cache" / "mflow_operators.json"
    monkeypatch.setattr(agreement, "_file", lambda: path)
    for module in (launch, fallback):
        monkeypatch.setattr(module, "is_guarded", lambda device: True)
    monkeypatch.setattr(agreement, "_faults", {})
    monkeypatch.setattr(fallback, "_failed", set())
    monkeypatch.setattr(fallback, "_warned", set())
    return path


Launched = Callable[[Any, tuple[Any, ...]], None]


def launches(monkeypatch: pytest.MonkeyPatch, before: Launched, after: Launched) -> None:
    """Call these around each launch, with the kernel and its arguments."""
    start = KernelInterface.__getitem__

    def getitem(kernel: Any, grid: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> None:
            before(kernel, arguments)
            start(kernel, grid)(*arguments, **options)
            after(kernel, arguments)

        return run

    monkeypatch.setattr(KernelInterface, "__getitem__", getitem)


def nothing(kernel: Any, arguments: tuple[Any, ...]) -> None:
    pass


def agreed(operator: str, device: torch.device) -> str:
    return ""


ERRORS = [OutOfResources(200_000, 101_376, "shared memory"), KeyError("maxnreg"), RuntimeError("?")]


@needs_kernels
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("op", FLOW_OPERATORS.values(), ids=lambda op: op.id)
def test_a_launch_that_fails(
    card: Path, monkeypatch: pytest.MonkeyPatch, op: Any, error: Exception
) -> None:
    """The reference computes results and gradients, in the shapes that the kernels promise."""
    monkeypatch.setattr(fallback, "_fault", agreed)
    inputs = sample(op, (2, 4, 3, 5), layout="channels_last")
    tried = []

    def fail(kernel: Any, arguments: tuple[Any, ...]) -> None:
        tried.append(kernel)
        raise error

    launches(monkeypatch, fail, nothing)

    def run() -> list[torch.Tensor]:
        results = op.call(*inputs.values())
        leaves = [t for t in inputs.values() if t.requires_grad]
        if not op.differentiable:
            return list(results)
        return [*results, *torch.autograd.grad([y.sum() for y in results], leaves)]

    with pytest.warns(UserWarning, match="cannot run on a state of this size") as warned:
        found = run()
    text = str(warned[0].message)
    name = op.name.replace("spline_coupling", "rational_quadratic")  # which computes it
    assert text.startswith(f"{name}: the kernel"), text
    for part in (type(error).__name__, "torch ", "triton ", "mflow_kernels.env --check"):
        assert part in text
    count = len(tried)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = run()
    assert len(tried) == count  # it is not compiled again
    with use_kernels("torch"):
        expected = run()
    for a, b, c in zip(found, again, expected, strict=True):
        assert_close(a, c.double(), terms=1000)
        assert torch.equal(a, b)


@needs_kernels
def test_a_backward_launch_that_fails(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward kernel's ledger has an entry for each tile, and its gradient too."""
    monkeypatch.setattr(fallback, "_fault", agreed)
    x, params = (torch.randn(2, c, 64, 64, requires_grad=True) for c in (4, 4))

    def fail(kernel: Any, arguments: tuple[Any, ...]) -> None:
        if "bwd" in kernel.fn.__name__:
            raise ERRORS[0]

    launches(monkeypatch, fail, nothing)
    y, logdet = ops.affine_coupling(x, params)
    with pytest.warns(UserWarning, match="affine_coupling: the kernel cannot run"):
        got = torch.autograd.grad(y.sum() + logdet.sum(), (x, params))
    with use_kernels("torch"):
        y, logdet = ops.affine_coupling(x, params)
        want = torch.autograd.grad(y.sum() + logdet.sum(), (x, params))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b.double(), terms=2)


@needs_kernels
def test_errors_that_are_not_about_a_launch_are_raised(
    card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(kernel: Any, arguments: tuple[Any, ...]) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(fallback, "_fault", agreed)
    launches(monkeypatch, no_memory, nothing)
    with pytest.raises(torch.OutOfMemoryError):
        ops.actnorm(torch.ones(2, 4), torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match="bias"):
        ops.actnorm(torch.ones(2, 4), torch.ones(3), torch.ones(4))


def wrong_tile(kernel: Any, arguments: tuple[Any, ...]) -> None:
    """Plant a fault in the results of actnorm: 64 numbers of 6,144 are zero."""
    if kernel.fn.__name__ == "_actnorm_fwd_kernel":
        y = arguments[3][0]
        y.as_strided((64,), (1,)).zero_()


def run_actnorm() -> torch.Tensor:
    x = torch.arange(8.0).reshape(2, 4)
    return ops.actnorm(x, torch.ones(4), torch.zeros(4))[0]


@needs_kernels
def test_one_wrong_tile_is_found_and_the_operator_is_not_used(
    card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    launches(monkeypatch, lambda kernel, _: launched.append(kernel.fn.__name__), wrong_tile)
    with pytest.warns(UserWarning, match="actnorm: the kernel is not used: .*a tile differs") as w:
        y = run_actnorm()
    assert len(w) == 1
    assert torch.equal(y, torch.arange(8.0).reshape(2, 4) + 1)
    stored = json.loads(card.read_text())
    assert [key.rsplit(", ", 1)[1] for key in stored] == ["actnorm"]
    assert list(card.parent.iterdir()) == [card]
    assert set(launched) == {"_actnorm_fwd_kernel", "_actnorm_bwd_kernel"}

    launched.clear()
    agreement._faults.clear()  # as in another process
    fallback._warned.clear()
    with pytest.warns(UserWarning, match="actnorm: the kernel is not used"):
        run_actnorm()
    assert not launched
    assert list(agreement.stored_faults(CPU)) == ["actnorm"]


@needs_kernels
def test_an_operator_that_agrees_is_compared_once(
    card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    launches(monkeypatch, lambda kernel, _: launched.append(kernel.fn.__name__), nothing)
    run_actnorm()
    assert launched[-1] == "_actnorm_fwd_kernel"
    assert launched.count("_actnorm_bwd_kernel") == 1  # of the comparison
    assert agreement.stored_faults(CPU) == {"actnorm": ""}
    agreement._faults.clear()  # as in another process
    launched.clear()
    run_actnorm()
    assert launched == ["_actnorm_fwd_kernel"]


@needs_kernels
def test_a_caller_disturbs_no_comparison(card: Path) -> None:
    """It runs in a thread, without the caller's inference mode or the dispatcher's state."""
    with torch.inference_mode():
        run_actnorm()
    torch.ops.mflow.accumulate_logdet(torch.ones(2, 3), torch.ones(()))
    assert agreement.stored_faults(CPU) == {"actnorm": "", "accumulate_logdet": ""}


@needs_kernels
@pytest.mark.parametrize(
    "case",
    # The others take the interpreter minutes; compiled kernels run them.
    [case for case in agreement.CASES if not re.search("192|512|rational", case.name)],
    ids=lambda case: case.name,
)
def test_kernels_agree(case: agreement.Case) -> None:
    found = agreement.compare(case, CPU)
    assert not found.fault
    assert found.error is not None
    assert found.error < case.limit / (2 if case.dtype == torch.float32 else 1.5)


def test_no_comparison_while_a_graph_is_captured(
    card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "capturing", lambda device: True)
    monkeypatch.setattr(agreement, "check", lambda *given: pytest.fail("compared"))
    assert agreement.fault("actnorm", CPU) == ""
    assert not agreement._faults  # the next call asks again


def test_no_memory_to_compare_in(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(case: agreement.Case, device: torch.device) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(agreement, "error_of", too_large)
    assert agreement.fault("actnorm", CPU) == ""
    assert not card.exists()
    monkeypatch.setattr(agreement, "error_of", lambda case, device: 1.0)
    assert "a tile differs" in agreement.fault("actnorm", CPU)


def test_every_operator_with_kernels_is_compared() -> None:
    names = {name.removesuffix("_backward") for name in fallback.FAKES} - {"masked_penalty"}
    assert set(agreement.OPERATORS) - {"rebuild_coupling", "rebuild_conv1x1"} == names & set(
        agreement.OPERATORS
    )
    rows = {op.name for op in OPERATORS} - {"masked_penalty", "spline_coupling"}
    assert rows == set(agreement.OPERATORS)
    assert "coupling_network" in DIFFERENTIABLE


def test_the_error_of_a_tile() -> None:
    """A norm of all elements would hide one wrong tile of 1,024."""
    b = torch.randn(1024 * card_files.TILE)
    a = b.clone()
    a[640:704] = 0
    assert ((a - b).norm() / b.norm()) < 0.05
    assert card_files.tile_error(a, b) > 0.5
    assert card_files.tile_error(b, b) == 0
    assert card_files.tile_error(a[:5], b[:5] + 1) == pytest.approx(
        1 / (b[:5] + 1).double().square().mean().sqrt().item()
    )
    assert card_files.tile_error(a[:5], b[:4]) == float("inf")
    assert card_files.tile_error(b * float("nan"), b) == float("inf")


def test_env_prints_a_table(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error_of(case: agreement.Case, device: torch.device) -> float:
        assert device == torch.device("cuda", 0)
        if case.operator == "rebuild_coupling":
            raise KeyError("maxnreg")
        return 1.0 if case.operator == "actnorm" else 1e-7

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(agreement, "error_of", error_of)
    card_files.card_of_results.cache_clear()
    table, agrees = env.check()
    lines = table.splitlines()
    assert not agrees
    assert len(lines) == 1 + len(agreement.CASES)
    (row,) = (line for line in lines if " actnorm " in line)
    assert re.search(r"cuda:0 +actnorm +1.0e\+00 +0.001 +actnorm: a tile differs", row)
    assert sum(line.endswith(" agrees") for line in lines) == len(agreement.CASES) - 2
    assert "KeyError: 'maxnreg'" in table
    shown = env._what_runs(torch.device("cuda", 0))
    assert sum("is not used" in line for line in shown) == 2
    card_files.card_of_results.cache_clear()


def test_which_kernels_a_context_uses() -> None:
    with pytest.raises(ValueError, match="which: expected auto or torch, got 'triton'"), \
            use_kernels("triton"):  # type: ignore[arg-type]  # fmt: skip
        pass
    assert not launch.transformed()
    with use_kernels("torch"):
        assert launch.transformed()
        with use_kernels("auto"):
            assert not launch.transformed()
        assert launch.transformed()
    assert not launch.transformed()


BY_TORCH = """
import torch
from mflow_kernels import Glow, ops
from mflow_kernels.ops import cpu, fallback, launch
from mflow_kernels.testing import check_bijection

assert cpu._C is None and not fallback.HAS_KERNELS
with launch.walking(launch.Walk(True, print)):
    assert not launch.uses_triton(torch.empty(2, 4, device="meta"))
check_bijection(Glow((2, 4, 4), levels=2, steps=2, width=4), (2, 2, 4, 4))
ops.masked_penalty(torch.randn(2, 4))
"""


def test_a_process_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFLOW_KERNELS", "torch")
    done = run_python("-W", "ignore", "-c", BY_TORCH)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("MFLOW_KERNELS", "none")
    done = run_python("-c", "import mflow_kernels.ops")
    assert "ValueError: MFLOW_KERNELS: expected auto or torch, got 'none'" in done.stderr
