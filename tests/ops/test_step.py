"""A step of flow as one call of csrc: values and gradients beside the reference."""

from typing import Any

import pytest
import torch
from cases import normal
from torch import Tensor

from mflow_kernels.ops import cpu
from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.ops.step import StepOptions, step, step_ref
from mflow_kernels.testing import assert_close

pytestmark = pytest.mark.skipif(
    KERNELS_ON_CPU or cpu.load_extension() is None, reason="csrc does it"
)


def factors_of(c: int, actnorm: bool) -> tuple[Any, ...]:
    """Of W and of an actnorm; log |s| is small, so that W is well conditioned."""
    permutation = torch.eye(c).double()[torch.randperm(c, generator=torch.Generator())]
    sign = torch.where(torch.arange(c) % 3 == 0, -1.0, 1.0).double()
    shapes = (c, c), (c, c), (c,), *(((c,), (c,)) if actnorm else ())
    drawn = [(0.2 * normal(*s, dtype=torch.float64)).requires_grad_() for s in shapes]
    return permutation, sign, *drawn, *(() if actnorm else (None, None))


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(
    "parts", ["linear", "coupling", "coupling, linear", "coupling, linear, actnorm", "all"]
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "vectors"])
def test_step(layout: str, parts: str, inverse: bool) -> None:
    """`all` also adds to the log-determinant of earlier steps."""
    shape = (4, 7) if layout == "vectors" else (3, 5, 4, 6)
    n, c, *sides = shape
    x = normal(*shape, dtype=torch.float64)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    params = before = None
    factors: tuple[Any, ...] = ()
    if parts != "coupling":
        factors = factors_of(c, "actnorm" in parts or parts == "all")
    if parts != "linear":
        params = normal(n, 2 * (c - c // 2), *sides, dtype=torch.float64).requires_grad_()
    if parts == "all":
        before = normal(n, 1, dtype=torch.float64).requires_grad_()
    dtype = torch.float64 if factors else None
    options = StepOptions(ScaleFunction.of("tanh") if params is not None else None)
    options = options._replace(inverse=inverse, inverse_linear=inverse, net_dtype=dtype)
    y, net, logdet = step(options, x, params, before, factors)
    want, want_logdet = step_ref(options, x, params, before, factors)
    terms = c * c * x[0].numel()
    assert_close(y, want, terms=terms)
    assert_close(logdet, want_logdet, terms=terms)
    cut = want[:, : c // 2]
    if net is not None:
        assert_close(net, cut, terms=terms)
    leaves = [t for t in (x, params, before, *factors) if t is not None and t.requires_grad]
    weights = normal(*shape, dtype=torch.float64), normal(n, 1, dtype=torch.float64)
    of_net = normal(*cut.shape, dtype=torch.float64)

    def gradients(y: Tensor, logdet: Tensor, net: Tensor | None) -> tuple[Tensor, ...]:
        loss = (y * weights[0]).sum() + (logdet * weights[1]).sum()
        loss = loss if net is None else loss + (net * of_net).sum()
        return torch.autograd.grad(loss, leaves)

    wants = gradients(want, want_logdet, cut if factors else None)
    for got, expected in zip(gradients(y, logdet, net), wants, strict=True):
        assert_close(got, expected, terms=100 * terms)
    with torch.no_grad():
        assert torch.equal(step(options, x, params, before, factors)[0], y)


def test_a_map_without_an_inverse_is_named() -> None:
    factors = list(factors_of(4, False))
    x, options = normal(2, 4, dtype=torch.float64), StepOptions(inverse_linear=True)
    for log_s, fault in ((-1e4, "singular"), (1e4, "not finite")):
        factors[4] = torch.full((4,), log_s).double()
        with torch.no_grad(), pytest.raises(ValueError, match=f"layer: .* one that is {fault}"):
            step(options, x, None, None, factors, "layer")
        y, _, _ = step(options, x, None, None, factors, "layer")  # training does not wait
        assert y.isnan().all()
