r"""The masked penalty of joint manifold learning (arXiv 2206.03293), summed for each sample.

Let e = input - target, m the mask (1: penalized) and w the weight. Each sum runs over one sample:

    penalty[n]  = sum m w rho(e)
    gaussian[n] = sum (1 - m) (-e^2/2 - log(2 pi)/2)      standard normal log-density of the rest

rho is "l2", e^2 / 2, or another function of `ops/penalty_functions.py`.

Gradients: de = g_penalty[n] m w rho'(e) - g_gaussian[n] (1 - m) e; d input = de, d target = -de.
Mask and weight are constants without a gradient.

A bool mask, or no mask, selects: the penalty ignores elements outside the mask, and the density
ignores those inside, even if e is NaN or infinite there. The gradients do the same, and also ignore
a sum whose gradient is 0. A floating-point mask multiplies, and 0 times NaN is NaN.

Shapes: input and target (N, C, *spatial); mask and weight broadcast to it and are read through
their own strides, never expanded; results (N,). dtypes: float32, float64, float16, bfloat16, summed
in float32 (float64 for float64), which is also the dtype of the results.
Bytes at least: forward input (and target, mask, weight) read; backward the same, gradients written.

The kernels are in csrc. They make one pass and no copy, in any layout. On a CPU they have no
float16, so torch widens it to float32 in a copy and rounds the gradients once. The shape alone
decides the order of the sums, so the bits are the same at every run and with any number of threads.
A mask or weight is read fastest in the memory format of the input.
"""

import math
import warnings
from contextlib import nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mflow_kernels.ops.checks import (
    STATE_DTYPES,
    check_broadcast,
    check_device,
    check_shape,
    check_state,
    check_tensor,
)
from mflow_kernels.ops.compiler import KERNELS
from mflow_kernels.ops.cpu import _C
from mflow_kernels.ops.launch import is_walked, noted, transformed, use_kernels
from mflow_kernels.ops.penalty_functions import HALF_LOG_2PI, Rho, check_rho, penalty_function
from mflow_kernels.ops.precision import accumulator
from mflow_kernels.ops.registration import gradients_of, register


def _terms(
    input: Tensor, target: Tensor | None, mask: Tensor | None, weight: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """e, m and w in the accumulator's dtype."""
    dtype = accumulator(input.dtype)
    e = input.to(dtype) if target is None else input.to(dtype) - target.to(dtype)
    m = 1.0 if mask is None else mask.to(dtype)
    return e, m, scale if weight is None else scale * weight.to(dtype)


def _split(
    e: Tensor, mask: Tensor | None, in_penalty: Tensor | bool, in_density: Tensor | bool
) -> tuple[Tensor, Tensor]:
    """Return e where it is penalized and `in_penalty`, and e of the rest where `in_density`.

    Both are 0 elsewhere. With a floating-point mask both are e, because the sums multiply by it.
    """
    if mask is not None and mask.dtype != torch.bool:
        return e, e
    on = e.new_ones((), dtype=torch.bool) if mask is None else mask
    return torch.where(on & in_penalty, e, 0.0), torch.where(~on & in_density, e, 0.0)


def masked_penalty_ref(
    input: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    scale: float,
    rho: str,
    delta: float,
    in_penalty: Tensor | bool = True,
    in_density: Tensor | bool = True,
) -> tuple[Tensor, Tensor]:
    """(penalty, gaussian); w is scale * weight. `_split` describes the last two arguments."""
    e, m, w = _terms(input, target, mask, weight, scale)
    penalized, rest = _split(e, mask, in_penalty, in_density)
    penalty = m * w * penalty_function(rho).value(penalized, delta)
    gaussian = (1 - m) * (-rest.square() / 2 - HALF_LOG_2PI)
    return penalty.flatten(1).sum(1), gaussian.flatten(1).sum(1)


@cache
def _why_not_cuda(device: torch.device) -> str | None:
    """Why the extension's kernels cannot run on a GPU; None if they can. Warns the first time."""
    if KERNELS == "torch" or torch.version.hip:  # nothing to build would help
        return "no kernels"
    if _C is None:
        why = "mflow_kernels._C is not built"
    elif not _C.cuda_archs:
        why = f"mflow_kernels._C has no CUDA kernels ({_C.cuda_note})"
    else:
        with torch.cuda.device(device):
            problem = _C.cuda_problem()
        if not problem:
            return None
        why = f"the CUDA kernels of mflow_kernels._C cannot run ({problem})"
    warnings.warn(
        f"masked_penalty: {why}, so plain torch is used on {device}. To build the kernels for this "
        "machine, install a CUDA toolkit that its driver supports, then run MFLOW_CUDA=1 pip "
        "install --force-reinstall --no-deps <the source folder>. `python -m mflow_kernels.env` "
        "shows what the extension was built for",
        stacklevel=3,
    )
    return why


def _native(device: torch.device) -> ModuleType | None:
    """The extension if it has kernels for `device`; None if the reference must run."""
    if transformed() or (device.type == "cuda" and _why_not_cuda(device)):
        return None
    return _C if device.type in ("cpu", "cuda") or is_walked() else None


def _must_widen(input: Tensor) -> bool:
    """Whether torch must widen `input` to float32. CPU loops have no float16, as C++17 has none."""
    return input.device.type == "cpu" and input.dtype == torch.float16


def _launch(
    kernel: Any,
    problem: tuple[Any, ...],
    given: tuple[Tensor, ...],
    results: tuple[Tensor | None, ...],
) -> None:
    input, target, mask, weight, scale, rho, delta = problem
    dtype = accumulator(input.dtype)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    if weight is not None:
        weight = weight.to(dtype)
    if noted("masked_penalty", (input, target, mask, weight, *given), results):
        return
    arguments = (input, target, mask, weight, scale, rho, delta, *given, *results)
    if input.is_cuda:
        with torch.cuda.device(input.device):
            kernel(True, torch.cuda.current_stream().cuda_stream, *arguments)
    else:
        kernel(False, torch.get_num_threads(), *arguments)


def _check_weight_values(weight: Tensor | None) -> None:
    # Reading a GPU tensor's values would make the host wait at every call. Under a transform there
    # are no values to read.
    if weight is not None and weight.device.type == "cpu" and weight.numel() and not transformed():
        low, high = (v.item() for v in weight.aminmax())
        if not (low >= 0 and high < math.inf):
            raise ValueError(
                f"weight: expected finite values of at least 0, got values from {low} to {high}"
            )


def _forward(
    input: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    scale: float,
    rho: str,
    delta: float,
) -> tuple[Tensor, Tensor]:
    _check_weight_values(weight)
    native = _native(input.device)
    if native is None:
        return masked_penalty_ref(input, target, mask, weight, scale, rho, delta)
    if _must_widen(input):
        input, target = input.float(), None if target is None else target.float()
    samples = input.shape[0]
    penalty = input.new_empty(samples, dtype=accumulator(input.dtype))
    gaussian = torch.empty_like(penalty)
    tiles = -(-math.prod(input.shape[1:]) // native.tile)
    partial = penalty.new_empty(2 * samples * tiles if tiles > 1 else 0)
    problem = input, target, mask, weight, scale, rho, delta
    _launch(native.masked_penalty, problem, (), (penalty, gaussian, partial))
    return penalty, gaussian


def _fake(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    penalty = input.new_empty(input.shape[0], dtype=accumulator(input.dtype))
    return penalty, torch.empty_like(penalty)


def _empty_gradients(
    input: Tensor, target: Tensor | None, for_input: bool, for_target: bool
) -> tuple[Tensor, Tensor]:
    """Uninitialized (d input, d target), laid out as these tensors; (0,) for one not needed."""
    dinput = torch.empty_like(input) if for_input else input.new_empty(0)
    dtarget = torch.empty_like(target) if for_target and target is not None else input.new_empty(0)
    return dinput, dtarget


def _backward(
    grad_penalty: Tensor,
    grad_gaussian: Tensor,
    input: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    scale: float,
    rho: str,
    delta: float,
    for_input: bool,
    for_target: bool,
) -> tuple[Tensor, Tensor]:
    dinput, dtarget = _empty_gradients(input, target, for_input, for_target)
    native = _native(input.device)
    if native is None:
        gradients = grad_penalty, grad_gaussian
        # A sum without a gradient may be NaN. A gradient of 0 may have a gradient of its own.
        used = [
            (torch.ones_like(g, dtype=torch.bool) if g.requires_grad else g != 0).view(
                -1, *(1,) * (input.dim() - 1)
            )
            for g in gradients
        ]
        (de,) = gradients_of(
            lambda e: masked_penalty_ref(e, None, mask, weight, scale, rho, delta, *used),
            [_terms(input, target, mask, weight, scale)[0]],
            gradients,
        )
        if for_input:
            dinput.copy_(de)
        if for_target:
            dtarget.copy_(-de)
        return dinput, dtarget
    if _must_widen(input):
        target = None if target is None else target.float()
        wide = _backward(
            *(grad_penalty, grad_gaussian, input.float(), target, mask, weight),
            *(scale, rho, delta, for_input, for_target),
        )
        return dinput.copy_(wide[0]), dtarget.copy_(wide[1])
    problem = input, target, mask, weight, scale, rho, delta
    results = dinput if for_input else None, dtarget if for_target else None
    _launch(native.masked_penalty_backward, problem, (grad_penalty, grad_gaussian), results)
    return dinput, dtarget


def _fake_backward(
    grad_penalty: Tensor, grad_gaussian: Tensor, input: Tensor, target: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(input, target, *rest[-2:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, ctx.rho, ctx.delta = inputs
    ctx.save_for_backward(*tensors)


def _gradient(
    ctx: Any, grad_penalty: Tensor, grad_gaussian: Tensor, run: Any
) -> tuple[Tensor | None, ...]:
    for_input, for_target = ctx.needs_input_grad[:2]
    again = torch.is_grad_enabled()
    with use_kernels("torch") if again else nullcontext():
        compute: Any = _backward if again else run
        dinput, dtarget = compute(
            *(grad_penalty, grad_gaussian, *ctx.saved_tensors),
            *(ctx.scale, ctx.rho, ctx.delta, for_input, for_target),
        )
    grads = (dinput if for_input else None, dtarget if for_target else None)
    return (*grads, None, None, None, None, None)


masked_penalty_op = register(
    "masked_penalty",
    _forward,
    _backward,
    fake=_fake,
    fake_backward=_fake_backward,
    setup=_setup,
    gradient=_gradient,
)


def _check_constant(name: str, value: Tensor, like: Tensor) -> None:
    """Check a mask or weight: it broadcasts to `like`, is on its device, and needs no gradient."""
    check_device(name, value, like)
    check_broadcast(name, value, tuple(like.shape))
    if value.requires_grad:
        raise ValueError(
            f"{name}: expected a constant (no gradient flows to it), got requires_grad=True; "
            "pass it detached"
        )


def _flat(value: Tensor, inner: torch.Size) -> Tensor:
    """The mask or weight of a state with more axes than the kernels take, as (N or 1, elements)."""
    samples = value.shape[0] if value.dim() > len(inner) else 1
    return value.expand(samples, *inner).flatten(1)


def masked_penalty_gaussian(
    input: Tensor,
    target: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    weight: Tensor | float = 1.0,
    rho: Rho = "huber",
    delta: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Penalty of the masked part and standard normal log-density of the rest, in one pass.

    Args:
        input: (N, C, *spatial), float32, float64, float16 or bfloat16, any layout.
        target: compared with input; same shape, dtype and device. Zero by default.
        mask: where the penalty applies: bool, or floating point from 0 (density) to 1 (penalty),
            with fractions for a mix of both. A bool mask keeps NaN and infinity in the rest out of
            the penalty, and those in the penalized part out of the density. Any shape that
            broadcasts to input's by torch's rules (per pixel (H, W), per channel (C, 1, 1), per
            sample (N, 1, 1, 1)). By default the penalty applies everywhere.
        weight: w, at least 0 and finite: a number, or a floating-point tensor that broadcasts. A
            tensor's values are checked on a CPU only, because reading them would stall a GPU.
        rho: name of a penalty function (`ops/penalty_functions.py`), such as "l2".
        delta: |e| at which huber turns from quadratic to linear; l2 and l1 ignore it.

    Returns:
        penalty and gaussian, each (N,), float32 (float64 for float64 inputs). Differentiable once
        with respect to input and target.

    Raises:
        TypeError: an argument is not a tensor or number, or a tensor has the wrong dtype.
        ValueError: shapes, devices, rho, delta or weight do not fit.

    Source: Razavi et al., arXiv 2206.03293, per-pixel penalized log-likelihood.
    """
    check_state("input", input)
    if target is not None:
        check_tensor("target", target, (input.dtype,))
        check_shape("target", target, tuple(input.shape))
        check_device("target", target, input)
    if mask is not None:
        check_tensor("mask", mask, (torch.bool, *STATE_DTYPES))
        _check_constant("mask", mask, input)
    scale, weights = 1.0, None
    if isinstance(weight, Tensor):
        weights = check_tensor("weight", weight)
        _check_constant("weight", weights, input)
    elif isinstance(weight, (int, float)) and not isinstance(weight, bool):
        scale = float(weight)
        if not (0 <= scale < math.inf):
            raise ValueError(f"weight: expected a finite number of at least 0, got {weight}")
    else:
        raise TypeError(f"weight: expected a number or a Tensor, got {type(weight).__name__}")
    check_rho(rho, delta)
    if input.dim() > 5:
        inner = input.shape[1:]
        input = input.flatten(1)
        target = None if target is None else target.flatten(1)
        mask = None if mask is None else _flat(mask, inner)
        weights = None if weights is None else _flat(weights, inner)
    penalty, gaussian = masked_penalty_op(input, target, mask, weights, scale, rho, float(delta))
    return penalty, gaussian


def masked_penalty(
    input: Tensor,
    target: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    weight: Tensor | float = 1.0,
    rho: Rho = "huber",
    delta: float = 1.0,
) -> Tensor:
    """Per-sample sum of mask * weight * rho(input - target), (N,).

    Arguments and errors are those of `masked_penalty_gaussian`.
    """
    return masked_penalty_gaussian(input, target, mask=mask, weight=weight, rho=rho, delta=delta)[0]
