r"""The masked penalty of joint manifold learning (arXiv 2206.03293), summed for each sample.

With e = input - target, mask m (1: penalized), weight w, sums over everything but the sample axis:

    penalty[n]  = sum m w rho(e)
    gaussian[n] = sum (1 - m) (-e^2/2 - log(2 pi)/2)      standard normal log-density of the rest

    rho(e): l2     e^2/2
            l1     |e|
            huber  e^2/2 where |e| <= delta, delta (|e| - delta/2) beyond

Gradients: de = g_penalty[n] m w rho'(e) - g_gaussian[n] (1 - m) e; d input = de, d target = -de.
Mask and weight are constants and carry none.

Shapes: input and target (N, C, *spatial); mask and weight broadcast to it and are read through
their own strides, never expanded; results (N,). dtypes: float32, float64, float16, bfloat16, summed
in float32 (float64 for float64), which is also the dtype of the results.
Bytes at least: forward input (and target, mask, weight) read; backward the same, gradients written.

The kernels are csrc's: one pass, no copy in any layout, sums in an order that the shape alone
decides, so that the bits are the same at every run and with any number of threads. A mask or weight
is read fastest in the memory format of the input.
"""

import math
import warnings
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from mflow_kernels.ops._checks import (
    STATE_DTYPES,
    check_broadcast,
    check_choice,
    check_device,
    check_shape,
    check_state,
    check_tensor,
)
from mflow_kernels.ops._launch import accumulator
from mflow_kernels.ops._native import _C

Rho = Literal["l2", "l1", "huber"]
RHOS = ("l2", "l1", "huber")
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def rho_ref(e: Tensor, rho: str, delta: float) -> Tensor:
    if rho == "l2":
        return e.square() / 2
    if rho == "l1":
        return e.abs()
    inside = e.abs().clamp(max=delta)
    return inside * (e.abs() - inside / 2)


def rho_slope_ref(e: Tensor, rho: str, delta: float) -> Tensor:
    if rho == "l2":
        return e
    return e.sign() if rho == "l1" else e.clamp(-delta, delta)


def _terms(
    input: Tensor, target: Tensor | None, mask: Tensor | None, weight: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """e, m, w in the accumulate type."""
    dtype = accumulator(input.dtype)
    e = input.to(dtype) if target is None else input.to(dtype) - target.to(dtype)
    m = 1.0 if mask is None else mask.to(dtype)
    return e, m, scale if weight is None else scale * weight.to(dtype)


def masked_penalty_ref(
    input: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    scale: float,
    rho: str,
    delta: float,
) -> tuple[Tensor, Tensor]:
    """(penalty, gaussian); w is scale * weight."""
    e, m, w = _terms(input, target, mask, weight, scale)
    penalty = m * w * rho_ref(e, rho, delta)
    gaussian = (1 - m) * (-e.square() / 2 - HALF_LOG_2PI)
    return penalty.flatten(1).sum(1), gaussian.flatten(1).sum(1)


def masked_penalty_backward_ref(
    grad_penalty: Tensor,
    grad_gaussian: Tensor,
    input: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    scale: float,
    rho: str,
    delta: float,
) -> Tensor:
    """d loss / d input, in the accumulate type."""
    e, m, w = _terms(input, target, mask, weight, scale)
    g, h = (v.view(-1, *(1,) * (e.dim() - 1)) for v in (grad_penalty, grad_gaussian))
    return g * m * w * rho_slope_ref(e, rho, delta) - h * (1 - m) * e


def _native(device: torch.device) -> ModuleType | None:
    """The extension if it serves `device`; None where the reference has to."""
    if device.type == "cuda" and (_C is None or not _C.cuda_archs):
        why = "is not built" if _C is None else f"has no CUDA kernels ({_C.cuda_note})"
        warnings.warn(
            f"masked_penalty: mflow_kernels._C {why}, so plain torch stands in on {device}. Build "
            "it where nvcc is on PATH or in CUDA_HOME: MFLOW_CUDA=1 pip install --force-reinstall "
            "--no-deps <the source folder>; `python -m mflow_kernels.env` shows what is inside",
            stacklevel=2,
        )
        return None
    return _C if device.type in ("cpu", "cuda") else None


def _address(tensor: Tensor | None, shape: torch.Size) -> tuple[int, tuple[int, ...]] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.expand(shape).stride())


def _launch(kernel: Any, problem: tuple[Any, ...], **rest: Any) -> None:
    input, target, mask, weight, scale, rho, delta = problem
    dtype, shape = accumulator(input.dtype), input.shape
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    if weight is not None:
        weight = weight.to(dtype)
    arguments = dict(
        dtype=str(input.dtype).removeprefix("torch."),
        shape=tuple(shape),
        input=_address(input, shape),
        target=_address(target, shape),
        mask=_address(mask, shape),
        mask_is_bool=mask is not None and mask.dtype == torch.bool,
        weight=_address(weight, shape),
        scale=scale,
        rho=rho,
        delta=delta,
        **rest,
    )
    if input.is_cuda:
        with torch.cuda.device(input.device):
            stream = torch.cuda.current_stream().cuda_stream
            kernel(cuda=True, queue=stream, **arguments)
    else:
        kernel(cuda=False, queue=torch.get_num_threads(), **arguments)


def _check_weight_values(weight: Tensor | None) -> None:
    # On a GPU this would stall the host at every call: there the caller checks, once.
    if weight is not None and weight.device.type == "cpu" and weight.numel():
        low, high = (v.item() for v in weight.aminmax())
        if not (low >= 0 and high < math.inf):
            raise ValueError(
                f"weight: expected finite values of at least 0, got values from {low} to {high}"
            )


@torch.library.custom_op("mflow::masked_penalty", mutates_args=())
def _masked_penalty(
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
    samples = input.shape[0]
    penalty = input.new_empty(samples, dtype=accumulator(input.dtype))
    gaussian = torch.empty_like(penalty)
    tiles = -(-math.prod(input.shape[1:]) // native.tile)
    partial = penalty.new_empty(2 * samples * tiles if tiles > 1 else 0)
    _launch(
        native.forward,
        (input, target, mask, weight, scale, rho, delta),
        penalty=penalty.data_ptr(),
        gaussian=gaussian.data_ptr(),
        partial=partial.data_ptr(),
    )
    return penalty, gaussian


@_masked_penalty.register_fake
def _(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    penalty = input.new_empty(input.shape[0], dtype=accumulator(input.dtype))
    return penalty, torch.empty_like(penalty)


def _gradients(
    input: Tensor, target: Tensor | None, for_input: bool, for_target: bool
) -> tuple[Tensor, Tensor]:
    """Room for (d input, d target) in their own layouts, empty where they are not asked for."""
    dinput = torch.empty_like(input) if for_input else input.new_empty(0)
    dtarget = torch.empty_like(target) if for_target and target is not None else input.new_empty(0)
    return dinput, dtarget


@torch.library.custom_op("mflow::masked_penalty_backward", mutates_args=())
def _masked_penalty_backward(
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
    dinput, dtarget = _gradients(input, target, for_input, for_target)
    native = _native(input.device)
    if native is None:
        de = masked_penalty_backward_ref(
            grad_penalty, grad_gaussian, input, target, mask, weight, scale, rho, delta
        )
        if for_input:
            dinput.copy_(de)
        if for_target:
            dtarget.copy_(-de)
        return dinput, dtarget
    _launch(
        native.backward,
        (input, target, mask, weight, scale, rho, delta),
        grad_penalty=(grad_penalty.data_ptr(), grad_penalty.stride(0)),
        grad_gaussian=(grad_gaussian.data_ptr(), grad_gaussian.stride(0)),
        dinput=_address(dinput if for_input else None, input.shape),
        dtarget=_address(dtarget if for_target else None, input.shape),
    )
    return dinput, dtarget


@_masked_penalty_backward.register_fake
def _(
    grad_penalty: Tensor, grad_gaussian: Tensor, input: Tensor, target: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    return _gradients(input, target, *rest[-2:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, ctx.rho, ctx.delta = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_penalty: Tensor, grad_gaussian: Tensor) -> tuple[Any, ...]:
    for_input, for_target = ctx.needs_input_grad[:2]
    dinput, dtarget = _masked_penalty_backward(
        *(grad_penalty, grad_gaussian, *ctx.saved_tensors),
        *(ctx.scale, ctx.rho, ctx.delta, for_input, for_target),
    )
    grads = (dinput if for_input else None, dtarget if for_target else None)
    return (*grads, None, None, None, None, None)


_masked_penalty.register_autograd(_differentiate, setup_context=_setup_context)


def _check_constant(name: str, value: Tensor, like: Tensor) -> None:
    """A mask or weight: broadcasts to `like`, same device, no gradient."""
    check_device(name, value, like)
    check_broadcast(name, value, tuple(like.shape))
    if value.requires_grad:
        raise ValueError(
            f"{name}: expected a constant (no gradient flows to it), got requires_grad=True; "
            "pass it detached"
        )


def _check_rho(rho: str, delta: float) -> None:
    check_choice("rho", rho, RHOS)
    if isinstance(delta, bool) or not isinstance(delta, (int, float)):
        raise TypeError(f"delta: expected a number, got {type(delta).__name__}")
    if not (0 < delta < math.inf):
        raise ValueError(f"delta: expected a finite number above 0, got {delta}")


def _flat(value: Tensor, inner: torch.Size) -> Tensor:
    """(N or 1, elements), for states of more axes than the kernels walk."""
    samples = value.shape[0] if value.dim() > len(inner) else 1
    return value.expand(samples, *inner).reshape(samples, -1)


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
        target: what input is compared with, same shape, dtype and device; zero by default.
        mask: where the penalty applies: bool, or floating point with 1 for penalized and fractions
            for both. Any shape that broadcasts to input's by torch's rules (per pixel (H, W), per
            channel (C, 1, 1), per sample (N, 1, 1, 1)). Everywhere by default.
        weight: w, at least 0 and finite: a number, or a floating-point tensor that broadcasts. A
            tensor's values are checked on a CPU only, since reading them would stall a GPU.
        rho: "l2", "l1" or "huber".
        delta: where huber turns from quadratic to linear, in units of input; others ignore it.

    Returns:
        penalty and gaussian, each (N,), float32 (float64 for float64 inputs). Differentiable once
        with respect to input and target.

    Raises:
        TypeError: an argument is no tensor or number, or a tensor of another dtype.
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
    _check_rho(rho, delta)
    if input.dim() > 5:
        inner = input.shape[1:]
        input = input.flatten(1)
        target = None if target is None else target.flatten(1)
        mask = None if mask is None else _flat(mask, inner)
        weights = None if weights is None else _flat(weights, inner)
    penalty, gaussian = _masked_penalty(input, target, mask, weights, scale, rho, float(delta))
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
    """sum m w rho(input - target) of each sample, (N,); arguments as `masked_penalty_gaussian`."""
    return masked_penalty_gaussian(input, target, mask=mask, weight=weight, rho=rho, delta=delta)[0]


@torch.compiler.assume_constant_result  # torch 2.9 cannot trace `float` of a tensor
def _log_normalizer_of_number(rho: Rho, weight: float, delta: float) -> float:
    return float(penalty_log_normalizer(rho, torch.tensor(weight, dtype=torch.float64), delta))


@overload
def penalty_log_normalizer(rho: Rho, weight: float, delta: float = 1.0) -> float: ...
@overload
def penalty_log_normalizer(rho: Rho, weight: Tensor, delta: float = 1.0) -> Tensor: ...
def penalty_log_normalizer(rho: Rho, weight: Tensor | float, delta: float = 1.0) -> Tensor | float:
    """log of the integral of exp(-weight rho(e)) over e: what makes the penalty a density.

        l2     log sqrt(2 pi / w)
        l1     log (2 / w)
        huber  log (sqrt(2 pi / w) erf(delta sqrt(w / 2)) + 2 / (w delta) exp(-w delta^2 / 2))

    Args:
        rho: "l2", "l1" or "huber".
        weight: w, a number above 0 or a tensor of them; where a tensor holds 0, no density exists
            and the result is infinite.
        delta: huber's, in units of e.

    Returns:
        Of the kind, shape and dtype of weight (float32 for float16 and bfloat16).
    """
    _check_rho(rho, delta)
    if not isinstance(weight, Tensor):
        if not (0 < weight < math.inf):
            raise ValueError(f"weight: expected a finite number above 0, got {weight}")
        return _log_normalizer_of_number(rho, weight, delta)
    w = check_tensor("weight", weight).to(accumulator(weight.dtype))
    gaussian = HALF_LOG_2PI - 0.5 * w.log()
    if rho == "l2":
        return gaussian
    if rho == "l1":
        return math.log(2) - w.log()
    # Both parts as logarithms, so that neither a tiny nor a huge weight overflows.
    knee = delta * (w / 2).sqrt()
    body = gaussian + torch.erf(knee).log()
    tails = math.log(2 / delta) - w.log() - knee.square()
    return torch.where(w > 0, torch.logaddexp(body, tails), math.inf)
