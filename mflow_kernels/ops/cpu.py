"""The operators on a CPU, by the loops of csrc.

A loop reads and writes memory once, where a reference does so about ten times. Each function
computes the same as the reference in its docstring, for float32 and float64 states. Call `serves`
or `serves_conv1x1` first.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mflow_kernels.ops.compiler import KERNELS
from mflow_kernels.ops.launch import is_walked, noted, transformed
from mflow_kernels.ops.layouts import dense_pixels, halves, net_input
from mflow_kernels.ops.partial_sums import empty_partial_sums
from mflow_kernels.ops.scale import ScaleFunction


def load_extension() -> ModuleType | None:
    """The loops; None if they were not built, or if $MFLOW_KERNELS turns them off."""
    if KERNELS == "torch":
        return None
    try:
        return importlib.import_module("mflow_kernels._C")
    except ModuleNotFoundError:  # a source checkout that was not built
        return None


_C: Any = load_extension()


def serves(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the loops can run on the state x, converted to `dtype` if that is given.

    They need a plain tensor with memory. Compilers, forward-mode differentiation and transforms of
    torch.func pass other tensors, and a fake tensor has no memory.
    """
    return (
        _C is not None
        and not torch.compiler.is_compiling()
        and not transformed()
        and type(x) in (Tensor, Parameter)
        and (dtype or x.dtype) in (torch.float32, torch.float64)
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


# The largest number of channels that the loop of foldings takes.
FOLD_MAX_CHANNELS: int = 0 if _C is None else _C.fold_max_channels


def serves_fold(lower: Tensor, dtype: torch.dtype) -> bool:
    """Whether the loop can fold factors such as L (C, C), to matrices of this dtype."""
    return lower.shape[-1] <= FOLD_MAX_CHANNELS and serves(lower, dtype) and not is_walked()


def fold(
    factors: Sequence[Tensor | None], dtype: torch.dtype, inverted: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, bool] | None]:
    """Compute `folding.fold_ref` of K steps from seven factors each, or the inverses of its maps.

    The last result is the number of the first map that has no finite inverse, if it needs one, and
    whether the map itself is not finite.
    """
    steps = [factors[i : i + 7] for i in range(0, len(factors), 7)]
    lower = steps[0][2]
    assert lower is not None
    k, c = len(steps), lower.shape[-1]
    weight = torch.empty((k, c, c), dtype=dtype)
    bias, log_det = torch.empty((k, c), dtype=dtype), torch.empty((), dtype=dtype)
    return weight, bias, log_det, _C.fold(steps, weight, bias, log_det, inverted)


def fold_backward(
    factors: Sequence[Tensor | None],
    dweight: Tensor,
    dbias: Tensor,
    dlog_det: Tensor,
    inverted: bool,
) -> list[Tensor | None]:
    """The gradients of `fold`'s factors; None for the permutations and signs."""
    dtype = dweight.dtype
    made = [
        None if f is None or i % 7 < 2 else torch.empty(f.shape, dtype=dtype)
        for i, f in enumerate(factors)
    ]
    starts = range(0, len(factors), 7)
    steps = [factors[i : i + 7] for i in starts]
    gradients = [tuple(made[i + 2 : i + 7]) for i in starts]
    _C.fold_backward(steps, dweight, dbias, dlog_det, inverted, gradients)
    return [
        g if g is None or f is None or g.dtype == f.dtype else g.to(f.dtype)
        for f, g in zip(factors, made, strict=True)
    ]


def change_half(
    loop: str,
    x: Tensor,
    params: Tensor,
    options: tuple[object, ...],
    identity_channels: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Compute `coupling.affine_coupling_ref` or `rational_quadratic.transform_ref`.

    Args:
        loop: "coupling" or "spline".
        options: `ScaleFunction.args` or `Spline.args`.
        identity_channels: number of channels that pass through; 0 if the tensors are halves.
    """
    x = dense_pixels(x)
    y, ledger = torch.empty_like(x), x.new_empty((x.shape[0], 1))
    _run(loop, identity_channels, x, params, y, ledger, options, inverse)
    return y, ledger


def change_half_backward(
    loop: str,
    dy: Tensor,
    dlogdet: Tensor,
    given: Tensor,
    params: Tensor,
    options: tuple[object, ...],
    identity_channels: int,
    inverse: bool,
    rebuilt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients dx and dparams of `change_half`, with dlogdet (N,) or (N, 1).

    `given` is x, or y if `rebuilt` receives the half x of a coupling.
    """
    given, params = dense_pixels(given), dense_pixels(params)
    dx, dparams = torch.empty_like(given), torch.empty_like(params, dtype=given.dtype)
    arguments = identity_channels, given, params, dy, dlogdet, rebuilt, dx, dparams
    _run(f"{loop}_backward", *arguments, options, inverse)
    return dx, dparams.to(params.dtype)


def masked_map(
    given: Tensor,
    plan: Tensor,
    numbers: Tensor,
    contexts: Sequence[Tensor],
    options: tuple[object, ...],
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Compute `masked_autoregressive_ref`, or the inverse: the result and its logdet (N,).

    Args:
        plan, numbers: those of a `SortedNetwork`.
        options: `ScaleFunction.args` or `Spline.args`.
    """
    result, logdet = torch.empty_like(given), given.new_empty(len(given))
    how = plan, numbers, tuple(contexts), options, isinstance(options[-1], list), inverse
    _run("masked_map", given, result, logdet, *how)
    return result, logdet


def masked_map_backward(
    dresult: Tensor,
    dlogdet: Tensor,
    given: Tensor,
    x: Tensor,
    plan: Tensor,
    numbers: Tensor,
    contexts: Sequence[Tensor],
    options: tuple[object, ...],
    inverse: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Compute the gradients of `masked_map`: those of `given`, the numbers and the contexts.

    Args:
        x: the map's x, which is `given` or, of an inverse, its result.
    """
    dgiven = torch.empty_like(given)
    dcontexts = [torch.zeros_like(c, dtype=given.dtype) for c in contexts]
    # The samples of a chunk are summed into one row. Its size depends on the shape alone.
    chunks = max(1, min(16, len(given) // 512))
    dnumbers = given.new_zeros(chunks, len(numbers))
    how = plan, numbers, tuple(contexts), options, isinstance(options[-1], list), inverse
    results = dgiven, dnumbers, tuple(dcontexts)
    _run("masked_map_backward", given, x, dresult, dlogdet, *results, *how)
    return dgiven, dnumbers[0] if chunks == 1 else dnumbers.sum(0), dcontexts


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

    def backward(given: Tensor, rebuilt: Tensor | None) -> tuple[Tensor, Tensor]:
        how = params, scale.args, 0, inverse, rebuilt
        return change_half_backward("coupling", dz_b, dlogdet, given, *how)

    dy_b, dparams = backward(z_b, y_b)
    if true_b is not None:
        dy_b, dparams = backward(true_b, None)
    return y_b, dy_b, dparams


def conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    net_dtype: torch.dtype | None,
    params: Tensor | None = None,
    scale: ScaleFunction | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor, Any]:
    """Compute `conv1x1_ref`, or `coupling_conv1x1_ref` if params are given.

    One stride must reach the pixels of x (`dense_pixels`). Returns y, the network input cut from y,
    and the ledger (None without params).
    """
    y = torch.empty_like(x)
    net = net_input(y, net_dtype)
    ledger = None if params is None else x.new_empty((x.shape[0], 1))
    cut = net_dtype == x.dtype
    how = () if scale is None else scale.args, inverse
    _run("conv1x1", x, params, weight, bias, y, net if cut else None, ledger, *how)
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
    coupling = params, dparams, dledger, scale.args, inverse
    _, _, dweight, dbias = conv1x1_backward(
        halves(x), halves(dy), dnet, weight, dx, coupling=coupling
    )
    return dx, dparams.to(params.dtype), dweight, dbias


def conv1x1_backward(
    y: tuple[Tensor, Tensor],
    dy: tuple[Tensor, Tensor],
    dnet: Tensor | None,
    weight: Tensor,
    dx: Tensor,
    weight_inverse: Tensor | None = None,
    bias: Tensor | None = None,
    net_dtype: torch.dtype | None = None,
    sums: tuple[Tensor, Tensor] | None = None,
    coupling: tuple[object, ...] = (None, None, None, (), False),
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Compute `rebuild_conv1x1_ref`: fill dx, and the sums outer_sum (1, C, C) and dbias (1, C).

    Returns x, allocated like dx, the network input cut from it, and the sums. Without
    weight_inverse, x is None, the network input is empty, and y holds the halves of x.
    """
    x = None if weight_inverse is None else torch.empty_like(dx)
    net = net_input(dx, None if x is None else net_dtype)
    cut = x is not None and net_dtype == dx.dtype
    if sums is None:
        outer_sum = empty_partial_sums(weight)
        sums = outer_sum, outer_sum.new_empty(outer_sum.shape[:2])
    if not dx.numel():
        sums[0].zero_()
        sums[1].zero_()
    results = x, net if cut else None, dx, *sums
    _run("conv1x1_backward", y, dy, dnet, weight, bias, weight_inverse, *results, *coupling)
    if x is not None and net_dtype is not None and not cut:
        net.copy_(x[:, : net.shape[1]])
    return x, net, *sums


def step(
    options: Any,
    x: Tensor,
    params: Tensor | None,
    before: Tensor | None,
    factors: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor | None, Tensor, bool | None]:
    """Compute `step.step_ref` and the network input.

    The last result is None if the linear map exists, or else whether it is not finite.
    """
    y, logdet = torch.empty_like(x), x.new_empty((x.shape[0], 1))
    dtype = options.net_dtype
    net = None if dtype is None else net_input(y, dtype)
    results = y, net if dtype == x.dtype else None, logdet
    infinite = _C.step(
        torch.get_num_threads(), x, params, factors or None, before, *results, *_how(options)
    )
    if net is not None and dtype != x.dtype:
        net.copy_(y[:, : net.shape[1]])
    return y, net, logdet, infinite


def step_backward(
    options: Any,
    x: Tensor,
    params: Tensor | None,
    factors: Sequence[Tensor | None],
    dy: Tensor,
    dnet: Tensor | None,
    dlogdet: Tensor,
    needs_dx: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, which is None if it is not needed, of params, and of factors."""
    dtype = x.dtype
    dx = torch.empty_like(x) if needs_dx or params is not None else None
    dparams = None if params is None else torch.empty_like(params, dtype=dtype)
    parameters = factors[2:]
    made = tuple(None if f is None else torch.empty(f.shape, dtype=dtype) for f in parameters)
    results = dx, dparams, made or None
    gradients = dy, dnet, dlogdet
    _C.step_backward(
        torch.get_num_threads(), x, params, factors or None, *gradients, *results, *_how(options)
    )
    pairs = zip((dparams, *made), (params, *parameters), strict=True)
    typed = (g if g is None or f is None or g.dtype == f.dtype else g.to(f.dtype) for g, f in pairs)
    return dx, next(typed), *(None for _ in factors[:2]), *typed


def _how(options: Any) -> tuple[object, ...]:
    scale = () if options.scale is None else options.scale.args
    return scale, options.inverse, options.inverse_linear


def actnorm(x: Tensor, bias: Tensor, log_scale: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """`actnorm.actnorm` or its inverse, of checked arguments."""
    y, logdet = torch.empty_like(x), x.new_empty(x.shape[0])
    _run("actnorm", x, bias, log_scale, y, logdet, inverse)
    return y, logdet


def actnorm_backward(
    dy: Tensor,
    dlogdet: Tensor,
    x: Tensor,
    bias: Tensor,
    log_scale: Tensor,
    inverse: bool,
    needs_dx: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of x, which is None if it is not needed, of bias and of log_scale."""
    dx = torch.empty_like(x) if needs_dx else None
    dbias, dlog_scale = x.new_empty(bias.shape), x.new_empty(bias.shape)
    _run("actnorm_backward", dy, dlogdet, x, bias, log_scale, dx, dbias, dlog_scale, inverse)
    return dx, dbias.to(bias.dtype), dlog_scale.to(log_scale.dtype)
