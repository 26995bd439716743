"""The kernel of the inverse of masked autoregressive maps.

A program holds a block of samples, one in each thread, and runs a list of instructions
(`SortedNetwork.instructions`). Each computes one row of values: one unit of all samples of the
block. Rows live in one scratch buffer, where a thread reads what it wrote itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mflow_kernels.ops.compiler import cdiv, tl, triton
from mflow_kernels.ops.launch import RUN_TIME, launch
from mflow_kernels.ops.precision import TL_DTYPE, accumulator
from mflow_kernels.ops.rational_quadratic_kernels import in_bin, next_knot, slopes
from mflow_kernels.ops.scale import ScaleFunction, _tanh_of_positive, log_scale
from mflow_kernels.ops.sorted_network import SortedNetwork
from mflow_kernels.ops.spline import Spline

BLOCK = 64  # samples of a program
WARPS = 2  # one sample for each thread
MOST = 1 << 16  # samples of a launch, which bound the scratch buffer


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def _tanh(x):
    t = _tanh_of_positive(tl.abs(x), tl.exp(-2 * tl.abs(x)))
    return tl.where(x < 0, -t, t)


@triton.jit
def _elu(x, alpha, over):
    return tl.where(x > 0, x, alpha * (tl.exp(tl.minimum(x, 0.0) * over) - 1))


@triton.jit
def _activation(x, constant, KIND: tl.constexpr):
    """The activation with this index in `ACTIVATIONS`."""
    if KIND == 0:
        y = tl.where(x < 0, 0.0, x)
    elif KIND == 1:
        y = tl.where(x > 0, x, constant * x)
    elif KIND == 2:
        y = _elu(x, constant, 1.0)
    elif KIND == 3:
        y = 1.0507009873554804934 * _elu(x, 1.6732632423543772848, 1.0)
    elif KIND == 4:
        y = _elu(x, constant, 1 / constant)
    elif KIND == 5:
        y = _tanh(x)
    elif KIND == 6:
        y = _sigmoid(x)
    elif KIND == 7:
        y = x * _sigmoid(x)
    elif KIND == 8:
        y = 0.5 * x * (1 + tl.erf(x * 0.70710678118654752440))
    elif KIND == 9:
        y = 0.5 * x * (1 + _tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)))
    elif KIND == 10:
        r = constant * x
        y = (tl.maximum(r, 0.0) + tl.log(1 + tl.exp(-tl.abs(r)))) / constant
        y = tl.where(r > 20, x, y)
    elif KIND == 12:
        y = tl.sin(x)
    elif KIND == 13:
        y = tl.cos(x)
    elif KIND == 14:
        y = x - 2 * constant * tl.floor(x / (2 * constant)) - constant
    else:
        y = x
    return y


@triton.jit
def _size(numbers, j, SPLINE: tl.constexpr, BLOCK: tl.constexpr):
    """Raw number j of each lane, a width or a height, as the softmax reads it."""
    r = tl.load(numbers + j * BLOCK) * (1.0 / SPLINE.temperature)
    if SPLINE.kind == "exp":
        r = r / (1 + tl.abs(r) * (2.0 / SPLINE.limit))
    return r


@triton.jit
def _solve_spline(z, numbers, SPLINE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """x and log dz/dx of one spline for each lane, whose raw number j is at numbers + j * BLOCK.

    `rational_quadratic_kernels.place` has all numbers of a tile in registers. Here a thread reads
    those that it wrote itself, one after the other.
    """
    K: tl.constexpr = SPLINE.bins
    LENGTH: tl.constexpr = SPLINE.high - SPLINE.low
    top_w = tl.full([BLOCK], float("-inf"), DTYPE)
    top_h = top_w
    for j in range(K):
        top_w = tl.maximum(top_w, _size(numbers, j, SPLINE, BLOCK))
        top_h = tl.maximum(top_h, _size(numbers, K + j, SPLINE, BLOCK))
    sum_w = tl.zeros([BLOCK], DTYPE)
    sum_h = sum_w
    for j in range(K):
        sum_w += tl.exp(_size(numbers, j, SPLINE, BLOCK) - top_w)
        sum_h += tl.exp(_size(numbers, K + j, SPLINE, BLOCK) - top_h)
    inside = (z >= SPLINE.low) & (z <= SPLINE.high)
    position = tl.where(inside, z - SPLINE.low, 0.0)
    bin = tl.zeros([BLOCK], tl.int32)
    x0 = tl.zeros([BLOCK], DTYPE)
    y0, w, h, edge_x, edge_y = x0, x0, x0, x0, x0
    for j in range(K):
        share_w = tl.exp(_size(numbers, j, SPLINE, BLOCK) - top_w) / sum_w
        share_h = tl.exp(_size(numbers, K + j, SPLINE, BLOCK) - top_h) / sum_h
        w_j = LENGTH * (SPLINE.min_width + (1 - SPLINE.min_width * K) * share_w)
        h_j = LENGTH * (SPLINE.min_height + (1 - SPLINE.min_height * K) * share_h)
        take = position >= edge_y
        bin = tl.where(take, j, bin)
        x0 = tl.where(take, edge_x, x0)
        y0 = tl.where(take, edge_y, y0)
        w = tl.where(take, w_j, w)
        h = tl.where(take, h_j, h)
        edge_x += w_j
        edge_y += h_j
    OFFSET: tl.constexpr = -1 if SPLINE.tails == "linear" else 0
    LAST: tl.constexpr = SPLINE.numbers - 1
    first = tl.maximum(2 * K + bin + OFFSET, 2 * K)
    second = tl.minimum(2 * K + next_knot(bin, SPLINE) + OFFSET, LAST)
    raw0 = tl.load(numbers + first * BLOCK)
    raw1 = tl.load(numbers + second * BLOCK)
    d0, d1 = slopes(raw0, raw1, bin, SPLINE)
    t, _, _, below, slant = in_bin(position, x0, y0, w, h, d0, d1, True)
    log_slope = tl.log(slant) + 2 * tl.log(h / w / below)
    OUTSIDE: tl.constexpr = 0.0 if SPLINE.tails is not None else float("nan")
    x = tl.where(inside, SPLINE.low + x0 + w * t, z + OUTSIDE)
    return x, tl.where(inside, log_slope, OUTSIDE)


@triton.jit(do_not_specialize=RUN_TIME)
def masked_inverse_kernel(
    z,
    x,
    logdet,
    contexts,
    instructions,
    numbers,
    scratch,
    N,
    D,
    CONTEXTS,
    COUNT,
    ROWS,
    TRANSFORM: tl.constexpr,
    IS_SPLINE: tl.constexpr,
    ACTIVATIONS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    block = tl.program_id(0).to(tl.int64)
    n = block * BLOCK + lane
    valid = n < N
    rows = scratch + block * ROWS * BLOCK
    own = rows + lane
    total = tl.zeros([BLOCK], DTYPE)
    for i in range(COUNT):
        at = instructions + i * 6
        kind = tl.load(at)
        out = tl.load(at + 1)
        source = tl.load(at + 2)
        other = tl.load(at + 3)
        first = tl.load(at + 4)
        second = tl.load(at + 5)
        if kind == 0:
            value = tl.zeros([BLOCK], DTYPE) + tl.load(numbers + second)
            for k in range(other):
                value += tl.load(numbers + first + k) * tl.load(own + (source + k) * BLOCK)
            tl.store(own + out * BLOCK, value)
        elif kind == 7:
            z_t = tl.load(z + n * D + other, mask=valid, other=0.0).to(DTYPE)
            if IS_SPLINE:
                value, log_slope = _solve_spline(z_t, own + source * BLOCK, TRANSFORM, DTYPE, BLOCK)
                total -= log_slope
            else:
                raw = tl.load(own + source * BLOCK)
                shift = tl.load(own + (source + 1) * BLOCK)
                log_s, _ = log_scale(raw, TRANSFORM)
                if TRANSFORM.shifts_first:
                    value = tl.exp(-log_s) * z_t - shift
                else:
                    value = tl.exp(-log_s) * (z_t - shift)
                total -= log_s
            tl.store(own + out * BLOCK, value)
            tl.store(x + n * D + other, value, mask=valid)
        else:
            # One way for all others: compilers make tables of jumps from many branches, and each
            # of these is a few loads.
            read = tl.load(own + source * BLOCK)
            row = tl.load(own + other * BLOCK, mask=(lane * 0 + kind) == 2, other=0.0)
            column = contexts + n * CONTEXTS + other
            is_given = valid & ((lane * 0 + kind) >= 4) & ((lane * 0 + kind) <= 5)
            given = tl.load(column, mask=is_given, other=0.0).to(DTYPE)
            weight = tl.where(kind == 3, tl.load(numbers + first), 1.0)
            bias = tl.where(kind == 3, tl.load(numbers + second), 0.0)
            value = weight * read + bias + row + tl.where(kind == 4, given, 0.0)
            value = tl.where(kind == 5, read * _sigmoid(given), value)
            if kind == 1:
                constant = tl.load(numbers + first)
                for a in tl.static_range(15):
                    if (ACTIVATIONS >> a) & 1:  # noqa: SIM102 - known to the compiler
                        if other == a:
                            value = _activation(read, constant, a)
            tl.store(own + out * BLOCK, value)
    tl.store(logdet + n, total, mask=valid)


def launch_inverse(
    z: Tensor,
    network: SortedNetwork,
    numbers: Tensor,
    contexts: Sequence[Tensor],
    transform: ScaleFunction | Spline,
) -> tuple[Tensor, Tensor]:
    """One launch for each MOST samples: x, and the logdet of the inverse (N,)."""
    is_spline = isinstance(transform, Spline)
    params = transform.numbers if isinstance(transform, Spline) else 2
    instructions, rows = network.instructions(params, z.device)
    z = z.contiguous().resolve_neg()
    x, logdet = torch.empty_like(z), z.new_empty(len(z), dtype=accumulator(z.dtype))
    given = torch.cat([*contexts], dim=1) if contexts else z
    for first in range(0, len(z), MOST):
        part = slice(first, first + MOST)
        blocks = cdiv(len(z[part]), BLOCK)
        scratch = torch.empty(blocks * rows * BLOCK, dtype=logdet.dtype, device=z.device)
        launch(
            masked_inverse_kernel,
            (blocks,),
            *(z[part], x[part], logdet[part], given[part], instructions, numbers, scratch),
            *(len(z[part]), z.shape[1], given.shape[1], len(instructions), rows),
            TRANSFORM=transform,
            IS_SPLINE=is_spline,
            ACTIVATIONS=network.activations,
            DTYPE=TL_DTYPE[logdet.dtype],
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return x, logdet
