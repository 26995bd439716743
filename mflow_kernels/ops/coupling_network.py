r"""The coupling network of Glow as one operator: 3x3, 1x1 and 3x3 convolutions with ReLU between.

    h1 = relu(W1 * x + b1),   h2 = relu(W2 h1 + b2),   params = W3 * h2 + b3

where * is a 3x3 convolution with zero padding (Glow, arXiv 1807.03039, section 4). With TAPS = 1 in
place of 9 all three are linear layers on vectors (N, C).

The forward launch keeps h1 and h2 on the chip. It multiplies h2 of a pixel by all nine taps of W3,
adds the three taps of each row from the pixel's neighbours in the tile, and writes these sums,
(pixels, 3 * C_out). A second launch adds the three rows. A hidden tensor H has `width` numbers a
pixel, and at Glow's first levels the sums have fewer than that. The backward pass needs h1 and h2,
so the forward launch stores them if gradients will be needed.

Gradients, with g = d loss / d params:
    d h2 = [h2 > 0] (W3^T * g),   d h1 = [h1 > 0] (W2^T d h2),   d x = W1^T * d h1
    d W3, d W2, d W1, d b3, d b2, d b1: sums over pixels of products of the above

One launch computes d h2, and another computes d h1 and its product with the taps of W1. Each also
computes the gradients of those weights whose operands it holds on the chip, as partial sums. One
reduction adds these in a fixed order, so the bits are the same on every run. A third launch adds
the taps of d x.

Shapes: x (N, C_in, H, W) and params (N, C_out, H, W) in channels_last, or (N, C); weights as
torch.nn.Conv2d and torch.nn.Linear have them.
dtypes: the kernels take bfloat16 and float16, and float32 if torch's settings let its layers round
factors to TF32 (`uses_tf32`). Products are summed in float32; the sums over rows of taps and the
hidden tensors have x's dtype.

Other networks are computed layer by layer. On CUDA cuDNN adds the bias and applies ReLU inside the
convolution (`has_epilogues`), and the backward pass masks a gradient in place by the sign of the
stored h1 or h2.

Bytes at least, in hidden tensors H, forward and backward:
    kernels    none, or 2 H written if gradients will be needed; h2 read, d h2 written, d h2 and h1
               read: 4 H, and 2 H more if wider than DW2_WIDTH
    layers     4 H and 16 H
    torch.nn   12 H and 16 H: each bias is a pass of its own, and so is each ReLU
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mflow_kernels.ops.compiler import KERNELS
from mflow_kernels.ops.coupling_network_launches import (
    empty_images,
    launch_network,
    launch_network_backward,
    pack,
    rows,
)
from mflow_kernels.ops.coupling_network_tiles import Shape
from mflow_kernels.ops.fallback import falls_back
from mflow_kernels.ops.fastest import fastest, requested
from mflow_kernels.ops.launch import AMD, architecture, is_walked, on_gpu, transformed, uses_triton
from mflow_kernels.ops.precision import accumulator, without_autocast
from mflow_kernels.ops.registration import gradients_of, register


def coupling_network_ref(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """params, h1 and h2."""
    h1 = layer(x, w1, b1).relu_()
    h2 = layer(h1, w2, b2).relu_()
    return layer(h2, w3, b3), h1, h2


def _rounded_ref(x: Tensor, *parameters: Tensor) -> Tensor:
    with without_autocast(x):
        return coupling_network_ref(x, *(p.to(x.dtype) for p in parameters))[0]


def network_by_layers(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """params, h1 and h2 by as few of torch's operators as possible, without autograd."""
    h1 = _layer_with_relu(x, w1, b1)
    h2 = _layer_with_relu(h1, w2, b2)
    return layer(h2, w3, b3), h1, h2


def network_by_layers_backward(
    dparams: Tensor,
    x: Tensor,
    h1: Tensor,
    h2: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    *,
    weights: bool,
) -> tuple[Any, ...]:
    """d x, d W1, d b1, d W2, d b2, d W3, d b3; without `weights`, d x and None for the others."""
    dh2, dw3, db3 = layer_backward(dparams, h2, w3, weights)
    dh1, dw2, db2 = layer_backward(_relu_backward_(dh2, h2), h1, w2, weights)
    dx, dw1, db1 = layer_backward(_relu_backward_(dh1, h1), x, w1, weights)
    return dx, dw1, db1, dw2, db2, dw3, db3


def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """One of the network's convolutions or, for vectors, linear layers."""
    return F.linear(x, w, b) if x.dim() == 2 else F.conv2d(x, w, b, padding=w.shape[2] // 2)


def _layer_with_relu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    if not has_epilogues(x):
        return layer(x, w, b).relu_()
    if x.dim() == 2:
        return torch._addmm_activation(b, x, w.t())
    padding = [w.shape[2] // 2] * 2
    return torch.cudnn_convolution_relu(x, w, b, [1, 1], padding, [1, 1], 1)


def layer_backward(
    dy: Tensor, x: Tensor, w: Tensor, weights: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x and, with `weights`, of w and b."""
    if x.dim() == 2:
        return dy @ w, dy.t() @ x if weights else None, dy.sum(0) if weights else None
    padding = [w.shape[2] // 2] * 2
    return torch.ops.aten.convolution_backward(
        dy, x, w, [len(w)], [1, 1], padding, [1, 1], False, [0, 0], 1, [True, weights, weights]
    )


def _relu_backward_(dh: Tensor, h: Tensor) -> Tensor:
    """dh, set to zero in place where h is not positive."""
    return torch.ops.aten.threshold_backward.grad_input(dh, h, 0.0, grad_input=dh)


def has_epilogues(x: Tensor) -> bool:
    """Whether bias and ReLU can be part of a convolution or product of x."""
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and KERNELS == "auto" and _has_cudnn(x.device) and not transformed()


def _has_cudnn(device: torch.device) -> bool:
    cudnn = torch.backends.cudnn
    if is_walked():
        return on_gpu(device)
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and cudnn.is_available() and cudnn.enabled


def supports(x: Tensor, w1: Tensor, w3: Tensor) -> bool:
    """Whether the kernels can compute this network on the input x.

    They take 16-bit dtypes, float32 if `uses_tf32`, and widths of 16 to 1,024. For images, C_in is
    at most 28 and C_out at most 56; for vectors, C_in is at most 256 and C_out at most 512. On
    AMD's cards the backward launches spill, so torch's layers compute networks there.
    """
    if not (uses_triton(x) and x.numel() and x.dim() in (2, 4)):
        return False
    if architecture(x.device) == AMD:
        return False
    known = (torch.bfloat16, torch.float16, *([torch.float32] if uses_tf32(x.dim() == 4) else []))
    return x.dtype in known and fits(Shape.of(x, w1.shape[0], w3.shape[0]))


@torch.compiler.assume_constant_result  # Dynamo does not trace these settings
def uses_tf32(images: bool) -> bool:
    """Whether torch's settings let float32 convolutions of images, or products of vectors, round
    their factors to TF32. By default only convolutions may."""
    if images:
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def fits(s: Shape) -> bool:
    """Whether the kernels have tiles for a network of these sizes."""
    return s.taps * s.c_out <= 512 and s.taps * s.c_in <= 256 and 16 <= s.width <= 1024


def implementation(
    x: Tensor, weights: Sequence[Tensor], training: bool
) -> Literal["torch", "kernels", "layers"]:
    """How to compute this network: by torch's own layers, or by `coupling_network` with its kernels
    or layer by layer.

    By default, this is the fastest implementation on this card, measured at first use: in training
    mode, of a training step, and otherwise of the forward pass. If $MFLOW_NETWORK is "torch" or
    "fused", it decides. Whether gradients are needed does not matter, because a reversible chain
    runs a network without them first, and again in its backward pass, and must get the same bits. A
    compiler fuses torch's layers itself, so it gets them unless $MFLOW_NETWORK is "fused".
    """
    choice = requested()
    compiles = torch.compiler.is_compiling()
    if choice == "torch" or (compiles and choice != "fused"):
        return "torch"
    kernels = supports(x, weights[0], weights[4])
    layers = x.dim() in (2, 4) and bool(x.numel()) and has_epilogues(x)
    if not kernels and (compiles or not layers):
        return "torch"
    if choice == "fused" or not x.is_cuda:
        return "kernels" if kernels else "layers"
    if isinstance(x, FakeTensor):  # there is nothing to measure
        return "torch"
    s = Shape.of(x, weights[0].shape[0], weights[4].shape[0])
    pixels = 1 << max(s.pixels - 1, 1).bit_length()  # one choice for batches of similar size
    given = cache(partial(_drawn, x, weights))  # drawn only if the card has no choice yet
    work = _train if training else _infer
    candidates = {"torch": partial(work, lambda *given: coupling_network_ref(*given)[0], given)}
    if layers:
        candidates["layers"] = partial(work, partial(coupling_network, kernels=False), given)
    if kernels:
        candidates["kernels"] = partial(work, partial(coupling_network, kernels=True), given)
    dtype = "tf32" if x.dtype == torch.float32 and uses_tf32(x.dim() == 4) else x.dtype
    key = f"{dtype}, {s.c_in}-{s.width}-{s.c_out}, {s.taps} taps, {pixels} pixels"
    key += ", training" if training else ", inference"
    return cast(Any, fastest(key, candidates, x.device))


def _drawn(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Draw normal numbers in the shapes of x and the weights, scaled to give results of order one.

    The weights of a new network are not measured: its last layer is zero, and so are most of its
    gradients.
    """
    generator = torch.Generator(x.device).manual_seed(0)
    drawn = [torch.empty_like(t, dtype=x.dtype).normal_(generator=generator) for t in (x, *weights)]
    return [t if i % 2 == 0 else t / t[0].numel() ** 0.5 for i, t in enumerate(drawn)]


def _train(run: Callable[..., Tensor], draw: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """Do the work of one network in a reversible training step: params and all gradients."""
    given = [t.detach().requires_grad_() for t in draw()]
    with without_autocast(given[0]):
        with torch.no_grad():
            run(*given)
        with torch.enable_grad():
            params = run(*given)
            return params, *torch.autograd.grad(params, given, torch.ones_like(params))


def _infer(run: Callable[..., Tensor], draw: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """Do the work of one network in sampling or evaluation: params."""
    given = draw()
    with without_autocast(given[0]), torch.no_grad():
        return (run(*given),)


def _dense(x: Tensor) -> Tensor:
    """x with its channels contiguous at each pixel."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


@falls_back("coupling_network")
def network_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    keep: bool,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute params, by the kernels or, without `kernels`, layer by layer.

    Returns params, h1, h2, and the weights as the kernels read them. Without `keep`, h1 and h2 are
    empty.
    """
    x = _dense(x)
    packed = pack(x, w1, w2, w3)
    if kernels and uses_triton(x):
        params, h1, h2 = launch_network(x, packed, b1, b2, b3, keep)
    else:
        s = Shape.of(x, w1.shape[0], w3.shape[0])
        v1, v2, v3 = s.layers(s.unpack(packed))
        c1, c2, c3 = (b.to(x.dtype) for b in (b1, b2, b3))
        with without_autocast(x):
            params, h1, h2 = map(_dense, network_by_layers(x, v1, c1, v2, c2, v3, c3))
    if h1 is None or h2 is None or not keep:
        h1, h2 = x.new_empty(0), x.new_empty(0)
    return params, h1, h2, packed


@falls_back("coupling_network_backward")
def network_backward(
    dparams: Tensor, x: Tensor, h1: Tensor, h2: Tensor, packed: Tensor, kernels: bool, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, the weights and the biases.

    Returns d x, the gradients that `Shape.sums` lists in one vector, and d W2, which is empty if
    the vector contains it. Sums are in float32 (float64). Without `weights`, only d x is returned
    and the others are empty.
    """
    x, dparams = _dense(x), _dense(dparams.to(x.dtype))
    wide = accumulator(x.dtype)
    with without_autocast(x):
        if kernels and uses_triton(x):
            return launch_network_backward(dparams, x, h1, h2, packed, weights)
        s = Shape.of(x, h1.shape[1], dparams.shape[1])
        layers = s.layers(s.unpack(packed))
        dx, dw1, db1, dw2, db2, dw3, db3 = network_by_layers_backward(
            dparams, x, h1, h2, *layers, weights=weights
        )
        nothing = x.new_empty(0, dtype=wide)
        if not weights:
            return _dense(dx), nothing, nothing.clone()
        separate_dw2 = nothing
        if not s.sums[1]:
            dw2, separate_dw2 = x.new_empty(0), rows(dw2).to(wide, copy=True)
        sums = [
            *(rows(dw).flatten() if dw.numel() else dw for dw in (dw1, dw2)),
            db1,
            rows(dw3).flatten(),
            db2,
            db3,
        ]
    return _dense(dx), torch.cat(sums).to(wide), separate_dw2


def _fake(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    keep: bool,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h1, h2 = (empty_images(x, len(w1)) if keep else x.new_empty(0) for _ in range(2))
    packed = x.new_empty(w1.numel() + w2.numel() + w3.numel())
    return empty_images(x, len(w3)), h1, h2, packed


def _fake_backward(
    dparams: Tensor, x: Tensor, h1: Tensor, h2: Tensor, packed: Tensor, kernels: bool, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    s = Shape.of(x, h1.shape[1], dparams.shape[1])
    sizes = (sum(s.sums), 0 if s.sums[1] else (s.width, s.width)) if weights else (0, 0)
    sums, dw2 = (x.new_empty(n, dtype=accumulator(x.dtype)) for n in sizes)
    return empty_images(x, s.c_in), sums, dw2


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *parameters, _, ctx.kernels = inputs
    _, *for_backward = output
    ctx.dtypes = [p.dtype for p in parameters]
    ctx.save_for_backward(x, *for_backward, *parameters)
    ctx.mark_non_differentiable(*for_backward)
    ctx.set_materialize_grads(False)  # or autograd fills gradients of h1 and h2 with zeros


def _gradient(ctx: Any, dparams: Tensor | None, *_: Any, run: Any) -> tuple[Tensor | None, ...]:
    if dparams is None:
        return (None,) * 9
    x, h1, h2, packed, *parameters = ctx.saved_tensors
    if torch.is_grad_enabled():
        return *gradients_of(_rounded_ref, (x, *parameters), (dparams,)), None, None
    weights = any(ctx.needs_input_grad[1:7])
    dx, sums, separate_dw2 = run(dparams, x, h1, h2, packed, ctx.kernels, weights)
    if not weights:
        return dx, *(None,) * 8
    s = Shape.of(x, h1.shape[1], dparams.shape[1])
    dw1, dw2, db1, dw3, db2, db3 = torch.split_with_sizes(sums, s.sums)
    dw1, dw2, dw3 = s.layers(s.shaped([dw1, dw2 if s.sums[1] else separate_dw2, dw3]))
    gradients = zip((dw1, db1, dw2, db2, dw3, db3), ctx.dtypes, strict=True)
    return dx, *(g.to(dtype) for g, dtype in gradients), None, None


coupling_network_op = register(
    "coupling_network",
    network_forward,
    network_backward,
    fake=_fake,
    fake_backward=_fake_backward,
    setup=_setup,
    gradient=_gradient,
)


def coupling_network(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    kernels: bool | None = None,
) -> Tensor:
    """Glow's coupling network (arXiv 1807.03039, section 4), forward and backward in few launches.

    Args:
        x: (N, C_in, H, W), best in channels_last, or (N, C_in), of a floating dtype.
        w1, b1: (width, C_in, 3, 3), or (width, C_in) for vectors, and (width,).
        w2, b2: (width, width, 1, 1) or (width, width), and (width,).
        w3, b3: (C_out, width, 3, 3) or (C_out, width), and (C_out,). Weights may have a
            higher precision than x, as under autocast. They are rounded to its dtype; their
            gradients are not.
        kernels: True to use the package's kernels, False to use torch's operators layer by layer.
            By default the kernels are used if they support the network (`supports`).

    Returns:
        params (N, C_out, *spatial) in x's dtype.
    """
    given = (x, w1, b1, w2, b2, w3, b3)
    if transformed():
        return coupling_network_ref(*given)[0]
    if kernels is None:
        kernels = supports(x, w1, w3)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if torch.compiler.is_compiling():
        run = coupling_network_op.registered
    else:
        run = coupling_network_op.eager if keep else network_forward
    return cast(Tensor, run(*given, keep, kernels)[0])
