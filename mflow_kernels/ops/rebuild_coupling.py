r"""Backward through a coupling that stored nothing: the first launch of a step's backward pass.

A chain of steps stores only its output z = couple(y, params), where y = W x + bias. Given the
gradient dz and params = net(z_a), which the caller computes again, one launch computes

    y_b = couple^-1(z_b, params),   dy_b, dparams as in `affine_coupling`         (y_a = z_a)

The backward pass of the network then turns dparams into a gradient of y_a, which `rebuild_conv1x1`
takes. The half that a coupling passes through is never copied: the `b` halves are separate tensors.
Set `inverse` to go back through the coupling of an inverse (sampling) chain.

Shapes: halves (N, C_b, *spatial), params (N, 2 * C_b, *spatial). dtypes: as `affine_coupling`.
Bytes at least: z_b, dz_b and params read; y_b, dy_b and dparams written.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mflow_kernels.ops import cpu
from mflow_kernels.ops.addresses import at, strided
from mflow_kernels.ops.compiler import tl, triton
from mflow_kernels.ops.coupling import couple_ref
from mflow_kernels.ops.coupling_kernels import couple, couple_backward, load_params, store_params
from mflow_kernels.ops.elementwise import launch_elementwise
from mflow_kernels.ops.fallback import falls_back
from mflow_kernels.ops.launch import RUN_TIME, uses_triton
from mflow_kernels.ops.layouts import channels_first, dense_pixels
from mflow_kernels.ops.registration import gradients_of
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.ops.tiles import columns, elementwise_tile


class RebuiltCoupling(NamedTuple):
    """Results of `rebuild_coupling`: the b halves of y and dy, and dparams."""

    y_b: Tensor
    dy_b: Tensor
    dparams: Tensor


def rebuild_coupling_ref(
    z_b: Tensor,
    dz_b: Tensor,
    dlogdet: Tensor,
    params: Tensor,
    scale: ScaleFunction,
    inverse: bool,
    true_b: Tensor | None = None,
) -> RebuiltCoupling:
    y_b, log_s = couple_ref(z_b, params, scale, not inverse)
    at_b = y_b if true_b is None else true_b.to(y_b.dtype)
    dlog_s = dlogdet.view(-1, *(1,) * (log_s.dim() - 1)).expand_as(log_s)
    reference = partial(couple_ref, scale=scale, inverse=inverse)
    dy_b, dparams = gradients_of(reference, (at_b, params), (dz_b.to(y_b.dtype), dlog_s))
    return RebuiltCoupling(y_b.to(z_b.dtype), dy_b.to(z_b.dtype), dparams)


@triton.jit(do_not_specialize=RUN_TIME)
def _rebuild_coupling_kernel(
    z_b,
    coupling_params,
    dz_b,
    dlogdet,
    true_b,
    y_b,
    dy_b,
    dparams,
    N,
    P,
    C_B: tl.constexpr,
    SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    n, p, valid = columns(tl.program_id(0), N, P, COLUMNS)
    dlog_s = tl.load(dlogdet + n, mask=valid, other=0.0)
    for start in range(0, C_B, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        raw, shift, inside = load_params(coupling_params, n, C_B + c, p, valid, 2 * C_B, DTYPE)
        z_t = tl.load(at(z_b, n, c, p), mask=inside, other=0.0).to(DTYPE)
        y_t, _ = couple(z_t, raw, shift, inside, SCALE, not INVERSE)
        tl.store(at(y_b, n, c, p), y_t, mask=inside)
        if true_b[0] is not None:
            y_t = tl.load(at(true_b, n, c, p), mask=inside, other=0.0).to(DTYPE)
        dz_t = tl.load(at(dz_b, n, c, p), mask=inside, other=0.0).to(DTYPE)
        dy_t, draw, dshift = couple_backward(y_t, raw, shift, inside, dz_t, dlog_s, SCALE, INVERSE)
        tl.store(at(dy_b, n, c, p), dy_t, mask=inside)
        store_params(dparams, draw, dshift, n, C_B + c, p, valid, 2 * C_B)


def launch_rebuild_coupling(
    z_b: Tensor,
    dz_b: Tensor,
    dlogdet: Tensor,
    params: Tensor,
    scale: ScaleFunction,
    inverse: bool,
    true_b: Tensor | None = None,
) -> RebuiltCoupling:
    """One launch."""
    true_b = None if true_b is None else dense_pixels(true_b)
    z_b, dz_b, params = dense_pixels(z_b), dense_pixels(dz_b), dense_pixels(params)
    y_b, dy_b, dparams = (torch.empty_like(t) for t in (z_b, z_b, params))
    block_c, block_p = elementwise_tile(z_b)
    if block_c <= 8 and not channels_first(z_b):
        block_p //= 2  # with whole tiles, narrow pixels spill
    launch_elementwise(
        _rebuild_coupling_kernel,
        z_b,
        *(strided(z_b), strided(params), strided(dz_b), dlogdet.contiguous(), strided(true_b)),
        *(strided(y_b), strided(dy_b), strided(dparams)),
        tile=(block_c, block_p),
        C_B=z_b.shape[1],
        SCALE=scale,
        INVERSE=inverse,
    )
    return RebuiltCoupling(y_b, dy_b, dparams)


@falls_back("rebuild_coupling")
def rebuild_coupling(
    z_b: Tensor,
    dz_b: Tensor,
    dlogdet: Tensor,
    params: Tensor,
    scale: ScaleFunction,
    inverse: bool,
    true_b: Tensor | None = None,
) -> RebuiltCoupling:
    """Run the first launch of a step's backward pass; on a CPU, its loop or its reference.

    Args:
        z_b: (N, C_b, *spatial), the half of the output that the coupling changed.
        dz_b: gradient of that half of the output.
        dlogdet: (N,).
        params: (N, 2 * C_b, *spatial), the network's output.
        scale, inverse: those of the forward pass.
        true_b: this half of y, if the forward pass stored it. The gradients are then those at this
            value, and the rebuilt one shows how far it is off.
    """
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = rebuild_coupling_ref
    if uses_triton(z_b):
        run = launch_rebuild_coupling
    elif cpu.serves(z_b):
        run = cpu.rebuild_coupling
    return RebuiltCoupling(*run(z_b, dz_b, dlogdet, params, scale, inverse, true_b))
