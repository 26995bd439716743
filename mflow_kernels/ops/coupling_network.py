r"""The coupling network of Glow as one operator: 3x3, 1x1 and 3x3 convolutions with ReLU between.

    h1 = relu(W1 * x + b1),   h2 = relu(W2 h1 + b2),   params = W3 * h2 + b3

where * is a 3x3 convolution with zero padding (Glow, arXiv 1807.03039, section 4). With TAPS = 1 in
place of 9 all three are linear layers on vectors (N, C).

The forward launch keeps h1 and h2 on the chip. It multiplies h2 of a pixel by all nine taps of W3,
adds the three taps of each row from the pixel's neighbours in the tile, and writes these sums,
(pixels, 3 * C_out). A second launch adds the three rows. A hidden tensor H has `width` numbers a
pixel, and for the states of Glow's first levels the sums have fewer. The backward pass needs h1 and
h2: the forward launch stores them if gradients will be needed.

Gradients, with g = d loss / d params:
    d h2 = [h2 > 0] (W3^T * g),   d h1 = [h1 > 0] (W2^T d h2),   d x = W1^T * d h1
    d W3, d W2, d W1, d b3, d b2, d b1: sums over pixels of products of the above

One launch computes d h2, another d h1 and its product with the taps of W1; each also computes the
gradients of the weights whose operands are on the chip then, as partial sums that one reduction
adds in a fixed order: the same bits on every run. A third launch adds the taps of d x.

Shapes: x (N, C_in, H, W) and params (N, C_out, H, W) in channels_last, or (N, C); weights as
torch.nn.Conv2d and torch.nn.Linear have them.
dtypes: the kernels take bfloat16 and float16. Products are summed in float32; the sums over rows of
taps and the hidden tensors have x's dtype. Tiles of float32 numbers do not fit the shared memory:
the reference computes those networks.
Bytes at least, in hidden tensors H: forward none, or 2 H written if gradients will be needed;
backward h2 read, d h2 written, d h2 and h1 read: 4 H, and 2 H more past DW2_WIDTH. cuDNN's
convolutions, each with a pass for its bias and one for ReLU, take 12 H and 16 H.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mflow_kernels.ops.coupling_network_kernels import (
    Shape,
    empty_images,
    launch_network,
    launch_network_backward,
    pack,
    rows,
)
from mflow_kernels.ops.fastest import fused_is_faster, requested
from mflow_kernels.ops.launch import transformed, uses_triton
from mflow_kernels.ops.precision import accumulator, without_autocast
from mflow_kernels.ops.registration import register


def coupling_network_ref(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """params, h1 and h2."""
    h1 = _layer(x, w1, b1).relu_()
    h2 = _layer(h1, w2, b2).relu_()
    return _layer(h2, w3, b3), h1, h2


def coupling_network_backward_ref(
    dparams: Tensor, x: Tensor, h1: Tensor, h2: Tensor, w1: Tensor, w2: Tensor, w3: Tensor
) -> tuple[Tensor, ...]:
    """d x, d W1, d b1, d W2, d b2, d W3, d b3."""
    dh2, dw3, db3 = _layer_backward(dparams, h2, w3)
    dh1, dw2, db2 = _layer_backward(dh2.masked_fill_(h2 <= 0, 0), h1, w2)
    dx, dw1, db1 = _layer_backward(dh1.masked_fill_(h1 <= 0, 0), x, w1)
    return dx, dw1, db1, dw2, db2, dw3, db3


def _layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b) if x.dim() == 2 else F.conv2d(x, w, b, padding=w.shape[2] // 2)


def _layer_backward(dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.dim() == 2:
        return dy @ w, dy.t() @ x, dy.sum(0)
    padding = [w.shape[2] // 2] * 2
    return torch.ops.aten.convolution_backward(
        dy, x, w, [len(w)], [1, 1], padding, [1, 1], False, [0, 0], 1, [True, True, True]
    )


def supports(x: Tensor, w1: Tensor, w3: Tensor) -> bool:
    """Whether the kernels compute this network on the input x: in 16 bits, with a width of 16 to
    1,024, for images with at most 56 channels."""
    if not _by_kernels(x) or x.dim() not in (2, 4) or not x.numel():
        return False
    return fits(Shape.of(x, len(w1), len(w3)))


def fits(s: Shape) -> bool:
    """Whether tiles of this network's weights fit the kernels."""
    return s.taps * s.c_out <= 512 and s.taps * s.c_in <= 256 and 16 <= s.width <= 1024


def prefers_fused(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether to compute this network by `coupling_network` and not by torch's own layers.

    By default the faster one in training on this card, measured at first use; $MFLOW_NETWORK, as
    "torch" or "fused", decides otherwise. One choice serves all directions: a reversible chain runs
    a network in its forward pass and again in its backward pass, and must get the same bits. A
    compiler fuses torch's layers itself: it gets them unless $MFLOW_NETWORK is "fused".
    """
    choice = requested()
    if torch.compiler.is_compiling():
        return choice == "fused"
    if choice != "auto" or not x.is_cuda:
        return choice != "torch"
    s = Shape.of(x, len(weights[0]), len(weights[4]))
    pixels = 1 << max(s.pixels - 1, 1).bit_length()  # one choice for batches of similar size
    key = f"{x.dtype}, {s.c_in}-{s.width}-{s.c_out}, {s.taps} taps, {pixels} pixels"
    return fused_is_faster(
        key,
        partial(_train, coupling_network, x, weights),
        partial(_train, lambda *given: coupling_network_ref(*given)[0], x, weights),
        x.device,
    )


def _train(run: Callable[..., Tensor], x: Tensor, weights: Sequence[Tensor]) -> None:
    """What one network does in a reversible training step."""
    x, *lowered = (t.detach().to(x.dtype).requires_grad_() for t in (x, *weights))
    with without_autocast(x):
        with torch.no_grad():
            run(x, *lowered)
        with torch.enable_grad():
            params = run(x, *lowered)
            torch.autograd.grad(params, (x, *lowered), torch.ones_like(params))


def _by_kernels(x: Tensor) -> bool:
    """Whether kernels compute a network of x; else the reference does. Tiles of float32 numbers do
    not fit the shared memory."""
    return uses_triton(x) and x.dtype in (torch.bfloat16, torch.float16)


def _dense(x: Tensor) -> Tensor:
    """x with its channels contiguous at each pixel."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def network_forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """params; h1 and h2 where `keep`, else empty; and the weights as the kernels read them."""
    x = _dense(x)
    packed = pack(x, w1, w2, w3)
    if _by_kernels(x):
        params, h1, h2 = launch_network(x, packed, b1, b2, b3, keep)
    else:
        s = Shape.of(x, len(w1), len(w3))
        v1, v2, v3 = s.layers(s.unpack(packed))
        c1, c2, c3 = (b.to(x.dtype) for b in (b1, b2, b3))
        params, h1, h2 = map(_dense, coupling_network_ref(x, v1, c1, v2, c2, v3, c3))
    if h1 is None or h2 is None or not keep:
        h1, h2 = x.new_empty(0), x.new_empty(0)
    return params, h1, h2, packed


def network_backward(
    dparams: Tensor, x: Tensor, h1: Tensor, h2: Tensor, packed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """d x; the gradients that `Shape.sums` lists, one after the other; and d W2, empty if it is
    among those. Sums are in float32 (float64)."""
    x, dparams = _dense(x), _dense(dparams.to(x.dtype))
    with without_autocast(x):
        if _by_kernels(x):
            return launch_network_backward(dparams, x, h1, h2, packed)
        s = Shape.of(x, h1.shape[1], dparams.shape[1])
        weights = s.layers(s.unpack(packed))
        dx, dw1, db1, dw2, db2, dw3, db3 = coupling_network_backward_ref(
            dparams, x, h1, h2, *weights
        )
        apart = x.new_empty(0)
        if not s.sums[1]:
            dw2, apart = apart, rows(dw2)
        sums = [*(rows(dw).flatten() for dw in (dw1, dw2, dw3)), db1, db2, db3]
    wide = accumulator(x.dtype)
    return _dense(dx), torch.cat(sums).to(wide), apart.to(wide, copy=True)


def _fake(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    h1, h2 = (empty_images(x, len(w1)) if keep else x.new_empty(0) for _ in range(2))
    packed = x.new_empty(w1.numel() + w2.numel() + w3.numel())
    return empty_images(x, len(w3)), h1, h2, packed


def _fake_backward(
    dparams: Tensor, x: Tensor, h1: Tensor, h2: Tensor, packed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    s = Shape.of(x, h1.shape[1], dparams.shape[1])
    apart = 0 if s.sums[1] else (s.width, s.width)
    sums, dw2 = (x.new_empty(n, dtype=accumulator(x.dtype)) for n in (sum(s.sums), apart))
    return empty_images(x, s.c_in), sums, dw2


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *parameters, _ = inputs
    _, *kept = output
    ctx.dtypes = [p.dtype for p in parameters]
    ctx.save_for_backward(x, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # or autograd fills gradients of h1 and h2 with zeros


def _gradient(ctx: Any, dparams: Tensor | None, *_: Any, run: Any) -> tuple[Tensor | None, ...]:
    if dparams is None:
        return (None,) * 8
    x, h1, *_ = ctx.saved_tensors
    s = Shape.of(x, h1.shape[1], dparams.shape[1])
    dx, sums, apart = run(dparams, *ctx.saved_tensors)
    dw1, dw2, dw3, db1, db2, db3 = sums.split(s.sums)
    dw1, dw2, dw3 = s.layers(s.shaped([dw1, dw2 if s.sums[1] else apart, dw3]))
    gradients = zip((dw1, db1, dw2, db2, dw3, db3), ctx.dtypes, strict=True)
    return dx, *(g.to(dtype) for g, dtype in gradients), None


coupling_network_op, network_eager = register(
    "coupling_network",
    network_forward,
    network_backward,
    fake=_fake,
    fake_backward=_fake_backward,
    setup=_setup,
    gradient=_gradient,
)


def coupling_network(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor
) -> Tensor:
    """Glow's coupling network (arXiv 1807.03039, section 4), forward and backward in few launches.

    Args:
        x: (N, C_in, H, W), best in channels_last, or (N, C_in). Kernels compute it in bfloat16 and
            float16, torch's layers in float32 and float64.
        w1, b1: (width, C_in, 3, 3), or (width, C_in) for vectors, and (width,).
        w2, b2: (width, width, 1, 1) or (width, width), and (width,).
        w3, b3: (C_out, width, 3, 3) or (C_out, width), and (C_out,). Weights may be wider than x,
            as under autocast; they are rounded to its dtype, and their gradients are not.

    Returns:
        params (N, C_out, *spatial) in x's dtype.
    """
    given = (x, w1, b1, w2, b2, w3, b3)
    if transformed():
        return coupling_network_ref(*given)[0]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if torch.compiler.is_compiling():
        run = coupling_network_op
    else:
        run = network_eager if keep else network_forward
    return cast(Tensor, run(*given, keep)[0])
