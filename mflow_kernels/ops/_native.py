"""The operators on a CPU by csrc's loops: one pass each where the references take ten.

Every function here does what the reference it names does, for float32 and float64 states in any
layout; `serves` and `mixes` say whether it may.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from mflow_kernels.ops._launch import dense_pixels, net_input, transformed
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
        and not transformed()
        and type(x) is Tensor
        and x.dtype in (torch.float32, torch.float64)
        and x.device.type == "cpu"
    )


# That the loops of 1x1 convolutions take.
MIXED_CHANNELS: int = 0 if _C is None else _C.mixed_channels


def mixes(x: Tensor) -> bool:
    """Whether the loops take the 1x1 convolution of a state x; past so many channels BLAS does."""
    return x.shape[1] <= MIXED_CHANNELS and serves(x)


def couple(x: Tensor, params: Tensor, scale: ScaleFunction, inverse: bool) -> tuple[Tensor, Tensor]:
    """`coupling.affine_coupling_ref`."""
    assert _C is not None
    x = dense_pixels(x)
    y, ledger = torch.empty_like(x), x.new_empty((x.shape[0], 1))
    _C.couple(
        torch.get_num_threads(), x.shape[1] // 2, x, params, y, ledger.data_ptr(), scale.args,
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
        other, dy, dparams, scale.args, inverse,
    )  # fmt: skip
    return dy, dparams if params.dtype == dtype else dparams.to(params.dtype)


def mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    net_dtype: torch.dtype | None,
    params: Tensor | None = None,
    scale: ScaleFunction | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`conv1x1_ref`, or `coupling_conv1x1_ref` where params are given: y, the network input cut
    from it, and the ledger (empty without params). Of states whose pixels one stride walks."""
    assert _C is not None
    y = torch.empty_like(x)
    net = net_input(y, net_dtype)
    ledger = x.new_empty((0 if params is None else x.shape[0], 1))
    cut = net_dtype == x.dtype
    _C.mix(
        torch.get_num_threads(), x, params, weight, bias, y, net if cut else None,
        ledger.data_ptr(), () if scale is None else scale.args, inverse,
    )  # fmt: skip
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
    """dx, dparams, and one partial sum of dW and d bias, of `coupling_conv1x1_ref`. Of states and
    params whose pixels one stride walks, and a ledger of one column."""
    assert _C is not None
    dx, dparams = torch.empty_like(x), torch.empty_like(params, dtype=x.dtype)
    gram, dbias = sums(x)
    _C.unmix_coupled(
        torch.get_num_threads(), x, params, dy, dnet, (dledger.data_ptr(), dledger.stride(0)),
        weight, dx, dparams, gram.data_ptr(), dbias.data_ptr(), scale.args, inverse,
    )  # fmt: skip
    return dx, dparams if params.dtype == x.dtype else dparams.to(params.dtype), gram, dbias


def unmix(
    y: tuple[Tensor, Tensor],
    dy: tuple[Tensor, Tensor],
    dnet: Tensor | None,
    weight: Tensor,
    weight_inverse: Tensor | None,
    bias: Tensor | None,
    dx: Tensor,
    gram: Tensor,
    dbias: Tensor,
    net_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Fill dx, gram (1, C, C) and dbias (1, C); return x, like dx, and the network input cut from
    it. Without a weight_inverse neither is made."""
    assert _C is not None
    x = None if weight_inverse is None else torch.empty_like(dx)
    net = net_input(dx, None if x is None else net_dtype)
    cut = x is not None and net_dtype == dx.dtype
    if not dx.numel():
        gram.zero_()
        dbias.zero_()
    _C.unmix(
        torch.get_num_threads(), y, dy, dnet, weight, bias, weight_inverse, x,
        net if cut else None, dx, gram.data_ptr(), dbias.data_ptr(),
    )  # fmt: skip
    if x is not None and net_dtype is not None and not cut:
        net.copy_(x[:, : net.shape[1]])
    return x, net


def sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for one partial sum of gram and d bias."""
    c = x.shape[1]
    new = x.new_empty if x.numel() else x.new_zeros
    return new((1, c, c)), new((1, c))
