"""The operators on a CPU by csrc's loops: one pass each where the references take ten.

Every function here does what the reference it names does, for float32 and float64 states in any
layout; `serves` says whether it may. Products of states stay BLAS's: of rows (N * P, C) where
channels are neighbours in memory, else of planes (N, C, P), so that no layout is copied to another.
"""

import importlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from mflow_kernels.ops._launch import (
    channels_first,
    dense_pixels,
    forward_mode,
    without_autocast,
)
from mflow_kernels.ops.scale import ScaleFunction


def load_extension() -> ModuleType | None:
    try:
        return importlib.import_module("mflow_kernels._C")
    except ModuleNotFoundError:  # a source checkout that nobody has built
        return None


_C = load_extension()


def serves(x: Tensor) -> bool:
    """Whether the loops take the state x: not where something other than a tensor in memory passes
    through, as for a compiler, forward mode, functorch or a fake tensor."""
    return (
        _C is not None
        and not torch.compiler.is_compiling()
        and not forward_mode()
        and type(x) is Tensor
        and x.dtype in (torch.float32, torch.float64)
        and x.device.type == "cpu"
    )


def couple(x: Tensor, params: Tensor, scale: ScaleFunction, inverse: bool) -> tuple[Tensor, Tensor]:
    """`coupling.affine_coupling_ref`."""
    assert _C is not None
    x = dense_pixels(x)
    y, ledger = torch.empty_like(x), x.new_empty((x.shape[0], 1))
    _C.couple(
        torch.get_num_threads(), x.shape[1] // 2, x, params, y, ledger.data_ptr(), *scale.args,
        inverse,
    )  # fmt: skip
    return y, ledger


def couple_backward(
    dy: Tensor,
    dlogdet: Tensor,
    x: Tensor,
    params: Tensor,
    scale: ScaleFunction,
    inverse: bool,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`coupling.coupling_backward_ref`, with dlogdet (N,); fills y, where given, with what x is
    coupled to, which costs little on the way."""
    return _uncouple(x, y, dy, dlogdet, params, scale, inverse, True, x.shape[1] // 2)


def uncouple(
    z_b: Tensor,
    dz_b: Tensor,
    dlogdet: Tensor,
    params: Tensor,
    scale: ScaleFunction,
    inverse: bool,
    kept: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`uncouple_ref`."""
    z_b = dense_pixels(z_b)
    y_b = None if kept else torch.empty_like(z_b)
    dy_b, dparams = _uncouple(z_b, y_b, dz_b, dlogdet, params, scale, inverse, kept, 0)
    return z_b if y_b is None else y_b, dy_b, dparams


def _uncouple(
    given: Tensor,
    other: Tensor | None,
    dz: Tensor,
    dlogdet: Tensor,
    params: Tensor,
    scale: ScaleFunction,
    inverse: bool,
    kept: bool,
    stays: int,
) -> tuple[Tensor, Tensor]:
    """dy and dparams of a coupling y -> z, from y where `kept`, else from z; the other one of the
    two is written to `other`. Of states of which so many channels stay."""
    assert _C is not None
    dtype, given, params = given.dtype, dense_pixels(given), dense_pixels(params)
    dlogdet = dlogdet if dlogdet.dtype == dtype else dlogdet.to(dtype)
    dy, dparams = torch.empty_like(given), torch.empty_like(params, dtype=dtype)
    _C.uncouple(
        torch.get_num_threads(), stays, kept, given, params, dz,
        (dlogdet.data_ptr(), dlogdet.stride(0)),
        other, dy, dparams, *scale.args, inverse,
    )  # fmt: skip
    return dy, dparams if params.dtype == dtype else dparams.to(params.dtype)


def _add_gradients(out: Tensor, a: Tensor, b: Tensor, dnet: Tensor | None) -> Tensor:
    """`out`, filled with (a + dnet, b)."""
    assert _C is not None
    _C.add_gradients(torch.get_num_threads(), out, a, b, dnet)
    return out


def _subtract_bias(out: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """`out`, filled with (a, b) - bias."""
    assert _C is not None
    _C.subtract_bias(torch.get_num_threads(), out, a, b, (bias.data_ptr(), bias.stride(0)))
    return out


def cut(x: Tensor, out: Tensor) -> Tensor:
    """`out`, filled with the first half of the state x."""
    recorded = x.requires_grad and torch.is_grad_enabled()  # by autograd, which sees no loop
    if out.dtype != x.dtype or recorded or not serves(x):
        return out.copy_(x[:, : out.shape[1]])
    assert _C is not None
    _C.cut(torch.get_num_threads(), out, x)
    return out


def _matrix(x: Tensor, rows: bool) -> Tensor:
    """The state x as rows (N * P, C), else as planes (N, C, P)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1]) if rows else x.flatten(2)


def _state(matrix: Tensor, like: Tensor, rows: bool) -> Tensor:
    n, _, *spatial = like.shape
    if rows:
        return matrix.view(n, *spatial, matrix.shape[1]).movedim(-1, 1)
    return matrix.view(n, matrix.shape[1], *spatial)


def _mix(weight: Tensor, matrix: Tensor, bias: Tensor | None, rows: bool) -> Tensor:
    if rows:
        return F.linear(matrix, weight, bias)
    weight = weight.expand(matrix.shape[0], *weight.shape)
    if bias is None:
        return torch.bmm(weight, matrix)
    return torch.baddbmm(bias[:, None], weight, matrix)


def _gram(a: Tensor, b: Tensor, rows: bool) -> tuple[Tensor, Tensor]:
    """sum a b^T and sum a over samples and pixels."""
    if rows:
        return a.t() @ b, a.sum(0)
    return torch.bmm(a, b.mT).sum(0), a.sum((0, 2))


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`conv1x1.conv1x1_ref`."""
    rows = not channels_first(x)
    with without_autocast(x):
        return _state(_mix(weight, _matrix(x, rows), bias, rows), x, rows)


def coupling_conv1x1_backward(
    dy: Tensor,
    dnet: Tensor | None,
    dlogdet: Tensor,
    x: Tensor,
    params: Tensor,
    weight: Tensor,
    scale: ScaleFunction,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dparams, dW and d bias of `coupling_conv1x1.coupling_conv1x1_ref`."""
    x = dense_pixels(x)
    z = torch.empty_like(x)
    rows, c_a = not channels_first(z), z.shape[1] // 2
    if dnet is not None:
        dy = _add_gradients(torch.empty_like(z), dy[:, :c_a], dy[:, c_a:], dnet)
    dy_m = _matrix(dy, rows)
    with without_autocast(z):
        dz = _state(_mix(weight.t(), dy_m, None, rows), z, rows)
        dx, dparams = couple_backward(dz, dlogdet, x, params, scale, inverse, z)
        return dx, dparams, *_gram(dy_m, _matrix(z, rows), rows)


def unmix(
    y: tuple[Tensor, Tensor],
    dy: tuple[Tensor, Tensor],
    dnet: Tensor | None,
    weight: Tensor,
    weight_inverse: Tensor | None,
    bias: Tensor,
    states: tuple[Tensor, Tensor],
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """x, dx, gram and d bias of `unmix_ref`; `states` is room for two, in its layout."""
    rows = not channels_first(states[0])
    y_m = _matrix(_subtract_bias(states[0], *y, bias), rows)
    dy_m = _matrix(_add_gradients(states[1], *dy, dnet), rows)
    with without_autocast(y_m):
        dx = _state(_mix(weight.t(), dy_m, None, rows), states[0], rows)
        gram, dbias = _gram(dy_m, y_m, rows)
        if weight_inverse is None:
            return None, dx, gram, dbias
        return _state(_mix(weight_inverse, y_m, None, rows), states[0], rows), dx, gram, dbias
