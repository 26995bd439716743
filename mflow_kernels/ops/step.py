"""A step of flow on a CPU as one call of csrc and one node of autograd's graph.

    z = couple(x, params)            if there are params (see `coupling.py`)
    y = W z + bias                   if there are factors, of which W is folded (see `folding.py`)
    logdet = before + sum of log s + P log |det W|

The network input, a copy of y's first half, and the log-determinant of all steps so far come from
the same call. The backward pass folds W again, because that costs less than to keep it.

Shapes: x and y (N, C, *spatial), before and logdet (N, 1).
dtypes: float32 or float64; params may be of a lower precision.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mflow_kernels.ops import cpu
from mflow_kernels.ops.conv1x1 import add_to_first_half, conv1x1_ref, not_invertible
from mflow_kernels.ops.coupling import affine_coupling_ref
from mflow_kernels.ops.folding import fold_ref
from mflow_kernels.ops.layouts import dense_pixels, pixels
from mflow_kernels.ops.registration import gradients_of
from mflow_kernels.ops.scale import ScaleFunction


class StepOptions(NamedTuple):
    """What a step computes.

    Attributes:
        scale: that of the coupling.
        inverse, inverse_linear: whether the coupling and the linear map are inverses.
        net_dtype: the dtype of the network input; None for none.
    """

    scale: ScaleFunction | None = None
    inverse: bool = False
    inverse_linear: bool = False
    net_dtype: torch.dtype | None = None


def step_ref(
    options: StepOptions,
    x: Tensor,
    params: Tensor | None,
    before: Tensor | None,
    factors: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """y and logdet."""
    logdet = x.new_zeros((len(x), 1)) if before is None else before
    if params is not None:
        assert options.scale is not None
        x, ledger = affine_coupling_ref(x, params, options.scale, options.inverse)
        logdet = logdet + ledger
    if not factors:
        return x, logdet
    zeros = torch.zeros_like(factors[4])  # type: ignore[arg-type]
    filled = ((zeros if f is None else f).to(x.dtype)[None] for f in factors)
    (weight,), (bias,), log_det = fold_ref(*filled)
    if options.inverse_linear:
        weight = torch.linalg.inv(weight.double())
        bias, log_det = -(weight @ bias.double()), -log_det
    return conv1x1_ref(x, weight, bias), logdet + pixels(x) * log_det


def _ref(options: StepOptions, x: Tensor, params: Tensor | None, *factors: Tensor | None) -> Any:
    return step_ref(options, x, params, None, factors)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: StepOptions,
        x: Tensor,
        params: Tensor | None,
        before: Tensor | None,
        *factors: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        ctx.options = options
        ctx.save_for_backward(x, params, *factors)
        return cpu.step(options, x, params, before, factors)[:3]

    @staticmethod
    @torch.compiler.disable  # a compiled function may call backward()
    def backward(
        ctx: Any, dy: Tensor, dnet: Tensor | None, dlogdet: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, params, *factors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for a second derivative
            given, gradients = (x, params, *factors), (add_to_first_half(dy, dnet), dlogdet)
            dx, dparams, *dfactors = gradients_of(partial(_ref, ctx.options), given, gradients)
            return None, dx, dparams, dlogdet if needs[3] else None, *dfactors
        given = dy, dnet, dlogdet, needs[1]
        dx, dparams, *dfactors = cpu.step_backward(ctx.options, x, params, factors, *given)
        return None, dx, dparams, dlogdet if needs[3] else None, *dfactors


def step(
    options: StepOptions,
    x: Tensor,
    params: Tensor | None,
    before: Tensor | None,
    factors: Sequence[Tensor | None] = (),
    name: str = "",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, the network input (None without a dtype), and logdet.

    Args:
        x: a state that `cpu.serves`; params, if given, are checked.
        factors: those of the linear map; none if there is no map.
        name: of the linear map, for the error.

    Raises:
        ValueError: an inverse of the map is needed and does not exist. Only checked while no
            gradients are recorded.
    """
    x = dense_pixels(x)
    if torch.is_grad_enabled():
        return _Step.apply(options, x, params, before, *factors)
    y, net, logdet, infinite = cpu.step(options, x, params, before, factors)
    if infinite is not None:
        raise not_invertible(name, infinite)
    return y, net, logdet
