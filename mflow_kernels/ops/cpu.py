"""The operators on a CPU, by the loops of csrc.

A loop reads and writes memory once, where a reference does so about ten times. Each function
computes the same as the reference in its docstring, for float32 and float64 states. Call `serves`
or `serves_conv1x1` first.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mflow_kernels.ops.launch import is_walked, noted, transformed
from mflow_kernels.ops.layouts import dense_pixels, net_input
from mflow_kernels.ops.partial_sums import empty_partial_sums
from mflow_kernels.ops.scale import ScaleFunction


def load_extension() -> ModuleType | None:
    try:
        return importlib.import_module("mflow_kernels._C")
    except ModuleNotFoundError:  # a source checkout that was not built
        return None


_C = load_extension()


def serves(x: Tensor) -> bool:
    """Whether the loops can run on the state x.

    They need a plain tensor with memory. Compilers, forward-mode differentiation and transforms of
    torch.func pass other tensors, and a fake tensor has no memory.
    """
    return (
        _C is not None
        and not torch.compiler.is_compiling()
        and not transformed()
        and type(x) is Tensor
        and x.dtype in (torch.float32, torch.float64)
        and (is_walked() if x.is_meta else x.device.type == "cpu")
    )


def _run(loop: str, *arguments: Any) -> None:
    """Run a loop of the extension."""
    if not noted(loop, (), ()):
        getattr(_C, loop)(torch.get_num_threads(), *arguments)


# The largest number of channels that the loops of 1x1 convolutions take.
CONV1X1_MAX_CHANNELS: int = 0 if _C is None else _C.conv1x1_max_channels


def serves_conv1x1(x: Tensor) -> bool:
    """Whether the loops can run a 1x1 convolution of x. With more channels BLAS is as fast."""
    return x.shape[1] <= CONV1X1_MAX_CHANNELS and serves(x)


def couple(x: Tensor, params: Tensor, scale: ScaleFunction, inverse: bool) -> tuple[Tensor, Tensor]:
    """Compute `coupling.affine_coupling_ref`."""
    x = dense_pixels(x)
    y, ledger = torch.empty_like(x), x.new_empty((x.shape[0], 1))
    _run("couple", x, params, y, ledger, scale.args, inverse)
    return y, ledger


def couple_backward(
    dy: Tensor, dlogdet: Tensor, x: Tensor, params: Tensor, scale: ScaleFunction, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `coupling.affine_coupling_ref`, with dlogdet (N,)."""
    return _coupling_backward(x, None, dy, dlogdet, params, scale, inverse, x.shape[1] // 2)


def rebuild_coupling(
    z_b: Tensor,
    dz_b: Tensor,
    dlogdet: Tensor,
    params: Tensor,
    scale: ScaleFunction,
    inverse: bool,
    true_b: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `rebuild_coupling_ref`."""
    z_b = dense_pixels(z_b)
    y_b = torch.empty_like(z_b)
    dy_b, dparams = _coupling_backward(z_b, y_b, dz_b, dlogdet, params, scale, inverse, 0)
    if true_b is not None:
        given = true_b, None
        dy_b, dparams = _coupling_backward(*given, dz_b, dlogdet, params, scale, inverse, 0)
    return y_b, dy_b, dparams


def _coupling_backward(
    given: Tensor,
    rebuilt: Tensor | None,
    dz: Tensor,
    dlogdet: Tensor,
    params: Tensor,
    scale: ScaleFunction,
    inverse: bool,
    identity_channels: int,
) -> tuple[Tensor, Tensor]:
    """dy and dparams of a coupling y -> z.

    Args:
        given: z if `rebuilt` receives y, otherwise y.
        rebuilt: receives y, or None.
        identity_channels: number of channels that the coupling passes through; 0 if the tensors are
            halves.
    """
    dtype, given, params = given.dtype, dense_pixels(given), dense_pixels(params)
    dy, dparams = torch.empty_like(given), torch.empty_like(params, dtype=dtype)
    _run(
        "coupling_backward",
        identity_channels,
        given,
        params,
        dz,
        dlogdet,
        rebuilt,
        dy,
        dparams,
        scale.args,
        inverse,
    )
    return dy, dparams.to(params.dtype)


def spline(
    x: Tensor, params: Tensor, spline_args: tuple[object, ...], identity: int, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Compute `rational_quadratic.transform_ref`. `spline_args` are `Spline.args`."""
    x = dense_pixels(x)
    y, ledger = torch.empty_like(x), x.new_empty((x.shape[0], 1))
    _run("spline", identity, x, params, y, ledger, spline_args, inverse)
    return y, ledger


def spline_backward(
    dy: Tensor,
    dlogdet: Tensor,
    x: Tensor,
    params: Tensor,
    spline_args: tuple[object, ...],
    identity: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `rational_quadratic.transform_ref`, with dlogdet (N,)."""
    x, params, dtype = dense_pixels(x), dense_pixels(params), x.dtype
    dx, dparams = torch.empty_like(x), torch.empty_like(params, dtype=dtype)
    _run("spline_backward", identity, dy, dlogdet, x, params, dx, dparams, spline_args, inverse)
    return dx, dparams.to(params.dtype)


def conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    net_dtype: torch.dtype | None,
    params: Tensor | None = None,
    scale: ScaleFunction | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `conv1x1_ref`, or `coupling_conv1x1_ref` if params are given.

    One stride must reach the pixels of x (`dense_pixels`). Returns y, the network input cut from y,
    and the ledger (empty without params).
    """
    y = torch.empty_like(x)
    net = net_input(y, net_dtype)
    ledger = x.new_empty((0 if params is None else x.shape[0], 1))
    cut = net_dtype == x.dtype
    _run(
        "conv1x1",
        x,
        params,
        weight,
        bias,
        y,
        net if cut else None,
        ledger,
        () if scale is None else scale.args,
        inverse,
    )
    if net_dtype is not None and not cut:
        net.copy_(y[:, : net.shape[1]])
    return y, net, ledger


def coupling_conv1x1_backward(
    dy: Tensor,
    dnet: Tensor | None,
    dledger: Tensor,
    x: Tensor,
    params: Tensor,
    weight: Tensor,
    scale: ScaleFunction,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `coupling_conv1x1_ref`: dx, dparams, and one partial sum each of dW
    and d bias.

    One stride must reach the pixels of x and params (`dense_pixels`). dledger is (N, 1).
    """
    dx, dparams = torch.empty_like(x), torch.empty_like(params, dtype=x.dtype)
    outer_sum, dbias = sums(x, weight)
    _run(
        "coupling_conv1x1_backward",
        x,
        params,
        dy,
        dnet,
        dledger,
        weight,
        dx,
        dparams,
        outer_sum,
        dbias,
        scale.args,
        inverse,
    )
    return dx, dparams.to(params.dtype), outer_sum, dbias


def conv1x1_backward(
    y: tuple[Tensor, Tensor],
    dy: tuple[Tensor, Tensor],
    dnet: Tensor | None,
    weight: Tensor,
    weight_inverse: Tensor | None,
    bias: Tensor | None,
    dx: Tensor,
    outer_sum: Tensor,
    dbias: Tensor,
    net_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Compute `rebuild_conv1x1_ref`: fill dx, outer_sum (1, C, C) and dbias (1, C).

    Returns x, allocated like dx, and the network input cut from it. Without weight_inverse, x is
    None and the network input is empty.
    """
    x = None if weight_inverse is None else torch.empty_like(dx)
    net = net_input(dx, None if x is None else net_dtype)
    cut = x is not None and net_dtype == dx.dtype
    if not dx.numel():
        outer_sum.zero_()
        dbias.zero_()
    _run(
        "conv1x1_backward",
        y,
        dy,
        dnet,
        weight,
        bias,
        weight_inverse,
        x,
        net if cut else None,
        dx,
        outer_sum,
        dbias,
    )
    if x is not None and net_dtype is not None and not cut:
        net.copy_(x[:, : net.shape[1]])
    return x, net


def sums(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Empty tensors for one partial sum of dW, shaped as weight, and one of d bias.

    They are zeros if the batch is empty.
    """
    dweight = empty_partial_sums(weight)
    dbias = dweight.new_empty(dweight.shape[:2])
    return (dweight, dbias) if x.numel() else (dweight.zero_(), dbias.zero_())
