r"""Backward through a coupling that stored nothing: the first launch of a step's way back.

A chain of steps keeps its output z = couple(y, params), y = W x + bias and nothing else. With the
gradient dz at hand, and params = net(z_a) computed again, one launch takes the coupling back:

    y_b = couple^-1(z_b, params),   dy_b, dparams as in `affine_coupling`         (y_a = z_a)

The network's backward then turns dparams into a gradient of y_a, and `unmix` goes on from there.
Where y was kept it is read in place of z and not rebuilt. The half that a coupling leaves alone is
never copied: `b` halves are tensors of their own. Set `inverse` to walk back through the coupling
of an inverse (sampling) chain.

Shapes: halves (N, C_b, *spatial), params (N, 2 * C_b, *spatial). dtypes: as `affine_coupling`.
Bytes at least: z_b, dz_b and params read; y_b, dy_b and dparams written.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mflow_kernels.ops import _native
from mflow_kernels.ops._launch import (
    TL_DTYPE,
    accumulator,
    columns,
    dense_pixels,
    elementwise_tile,
    pixels,
    strides,
    tile_columns,
    uses_triton,
)
from mflow_kernels.ops.coupling import (
    couple,
    couple_backward,
    couple_backward_ref,
    couple_ref,
    load_params,
)
from mflow_kernels.ops.scale import ScaleFunction


class Uncoupled(NamedTuple):
    """What the launch leaves: the b halves of y and dy, and dparams."""

    y_b: Tensor
    dy_b: Tensor
    dparams: Tensor


def uncouple_ref(
    z_b: Tensor,
    dz_b: Tensor,
    dlogdet: Tensor,
    params: Tensor,
    scale: ScaleFunction,
    inverse: bool,
    kept: bool,
) -> Uncoupled:
    y_b, log_s = z_b, None
    if not kept:
        y_b, log_s = couple_ref(z_b, params, scale, not inverse)
        log_s = log_s if inverse else -log_s
    dy_b, dparams = couple_backward_ref(dz_b, dlogdet, y_b, params, scale, inverse, log_s)
    return Uncoupled(y_b.to(z_b.dtype), dy_b.to(z_b.dtype), dparams)


@triton.jit
def _uncouple_kernel(
    z_b, coupling_params, dz_b, dlogdet, y_b, dy_b, dparams, N, P: tl.constexpr,
    z_n: tl.constexpr, z_c: tl.constexpr, z_p: tl.constexpr,
    params_n: tl.constexpr, params_c: tl.constexpr, params_p: tl.constexpr,
    dz_n: tl.constexpr, dz_c: tl.constexpr, dz_p: tl.constexpr,
    y_n: tl.constexpr, y_c: tl.constexpr, y_p: tl.constexpr,
    dy_n: tl.constexpr, dy_c: tl.constexpr, dy_p: tl.constexpr,
    dparams_n: tl.constexpr, dparams_c: tl.constexpr, dparams_p: tl.constexpr,
    C_B: tl.constexpr, SCALE: tl.constexpr, INVERSE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    n, p, valid = columns(tl.program_id(0), N, P, BLOCK_P, FLAT)
    dlog_s = tl.load(dlogdet + n, mask=valid, other=0.0)
    for start in range(0, C_B, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        raw, shift, inside = load_params(
            coupling_params, n, C_B + c, p, valid, 2 * C_B, params_n, params_c, params_p, DTYPE
        )
        at_z = z_b + n[None, :] * z_n + c[:, None] * z_c + p[None, :] * z_p
        y_t = tl.load(at_z, mask=inside, other=0.0).to(DTYPE)
        if y_b is not None:
            y_t, _ = couple(y_t, raw, shift, inside, SCALE, not INVERSE)
            at_y = y_b + n[None, :] * y_n + c[:, None] * y_c + p[None, :] * y_p
            tl.store(at_y, y_t, mask=inside)
        at_dz = dz_b + n[None, :] * dz_n + c[:, None] * dz_c + p[None, :] * dz_p
        dz_t = tl.load(at_dz, mask=inside, other=0.0).to(DTYPE)
        dy_t, draw, dshift = couple_backward(y_t, raw, shift, inside, dz_t, dlog_s, SCALE, INVERSE)
        at_dy = dy_b + n[None, :] * dy_n + c[:, None] * dy_c + p[None, :] * dy_p
        tl.store(at_dy, dy_t, mask=inside)
        at = dparams + n[None, :] * dparams_n + c[:, None] * dparams_c + p[None, :] * dparams_p
        tl.store(at, draw, mask=inside)
        tl.store(at + C_B * dparams_c, dshift, mask=inside)


def launch_uncouple(
    z_b: Tensor,
    dz_b: Tensor,
    dlogdet: Tensor,
    params: Tensor,
    scale: ScaleFunction,
    inverse: bool,
    kept: bool,
) -> Uncoupled:
    """One launch. z_b is the coupling's output, or its input where that was `kept`."""
    z_b, dz_b, params = dense_pixels(z_b), dense_pixels(dz_b), dense_pixels(params)
    n, c_b, p = z_b.shape[0], z_b.shape[1], pixels(z_b)
    y_b = None if kept else torch.empty_like(z_b)
    dy_b, dparams = torch.empty_like(z_b), torch.empty_like(params)
    block_c, block_p = elementwise_tile(z_b)
    tiles = tile_columns(n, p, block_p)
    if n:
        _uncouple_kernel[(tiles.programs,)](
            z_b, params, dz_b, dlogdet.contiguous(), y_b, dy_b, dparams, n, p,
            *strides(z_b), *strides(params), *strides(dz_b), *strides(y_b), *strides(dy_b),
            *strides(dparams),
            C_B=c_b, SCALE=scale, INVERSE=inverse, DTYPE=TL_DTYPE[accumulator(z_b.dtype)],
            BLOCK_C=block_c, BLOCK_P=block_p, FLAT=tiles.flat,
        )  # fmt: skip
    return Uncoupled(z_b if y_b is None else y_b, dy_b, dparams)


def uncouple(
    z_b: Tensor,
    dz_b: Tensor,
    dlogdet: Tensor,
    params: Tensor,
    scale: ScaleFunction,
    inverse: bool,
    kept: bool,
) -> Uncoupled:
    """The first launch of a step's backward; on a CPU its loop or reference.

    Args:
        z_b: (N, C_b, *spatial), the half that the coupling changed, or where `kept` its input.
        dz_b: gradient of the coupling's output, that half.
        dlogdet: (N,).
        params: (N, 2 * C_b, *spatial), the network's output.
        scale, inverse: of the coupling as it ran.
    """
    if not uses_triton(z_b) and _native.serves(z_b):
        return Uncoupled(*_native.uncouple(z_b, dz_b, dlogdet, params, scale, inverse, kept))
    run = launch_uncouple if uses_triton(z_b) else uncouple_ref
    return run(z_b, dz_b, dlogdet, params, scale, inverse, kept)
