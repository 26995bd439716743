r"""Accumulation of log-determinants: the deterministic ledger.

    logdet[n] = constant + sum_t ledger[n, t]

Every launch that scales a state writes each tile's sum of log s to a separate entry of a ledger
(N, T), float32 (float64 for float64 states). The constant holds the terms that all samples share:
P * log |det W| and P * sum(log_scale) of each step. One launch adds the entries in a fixed order
without atomics, so the bits are the same on every run.

Gradients: d ledger[n, t] = d logdet[n], a broadcast view; d constant = sum_n d logdet[n].
Bytes at least: the ledger read once, N results written.
"""

from typing import Any

import torch
from torch import Tensor

from mflow_kernels.ops.checks import check_device, check_shape, check_tensor
from mflow_kernels.ops.compiler import tl, triton
from mflow_kernels.ops.fallback import falls_back
from mflow_kernels.ops.launch import launch, uses_triton
from mflow_kernels.ops.registration import register

BLOCK_T = 1024


def accumulate_logdet_ref(ledger: Tensor, constant: Tensor) -> Tensor:
    return ledger.sum(1) + constant


@triton.jit(do_not_specialize=["T"])
def _accumulate_kernel(ledger, constant, logdet, T, BLOCK_T: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_T], ledger.dtype.element_ty)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        total += tl.load(ledger + n * T + t, mask=t < T, other=0.0)
    tl.store(logdet + n, tl.sum(total) + tl.load(constant))


def launch_accumulate(ledger: Tensor, constant: Tensor) -> Tensor:
    n, t = ledger.shape
    logdet = ledger.new_empty(n)
    if n:
        # BLOCK_T is the same for every T: another image size must not compile the kernel again.
        args = (ledger.contiguous(), constant, logdet, t)
        launch(_accumulate_kernel, (n,), *args, BLOCK_T=BLOCK_T)
    return logdet


@falls_back("accumulate_logdet")
def _forward(ledger: Tensor, constant: Tensor) -> Tensor:
    run = launch_accumulate if uses_triton(ledger) else accumulate_logdet_ref
    return run(ledger, constant)


def _fake(ledger: Tensor, constant: Tensor) -> Tensor:
    return ledger.new_empty(ledger.shape[0])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.columns = inputs[0].shape[1]


def _gradient(ctx: Any, dlogdet: Tensor, run: None) -> tuple[Tensor, Tensor]:
    return dlogdet[:, None].expand(-1, ctx.columns), dlogdet.sum()


accumulate_logdet_op = register(
    "accumulate_logdet", _forward, fake=_fake, setup=_setup, gradient=_gradient
)


def accumulate_logdet(ledger: Tensor, constant: Tensor) -> Tensor:
    """Sum each sample's partial log-determinants and a constant, in a fixed order.

    Args:
        ledger: (N, T) float32 or float64, natural log.
        constant: scalar tensor of the same dtype and device, added for every sample.

    Returns:
        (N,) log-determinants in the ledger's dtype.

    Raises:
        TypeError, ValueError: on a dtype, shape or device that does not fit.
    """
    check_tensor("ledger", ledger, (torch.float32, torch.float64))
    check_tensor("constant", constant, (ledger.dtype,))
    if ledger.dim() != 2:
        raise ValueError(f"ledger: expected shape (N, T), got {tuple(ledger.shape)}")
    check_shape("constant", constant, ())
    check_device("constant", constant, ledger)
    return sum_ledger(ledger, constant)


def sum_ledger(ledger: Tensor, constant: Tensor | None = None) -> Tensor:
    """`accumulate_logdet` without checks, and without a constant if it is None."""
    if ledger.shape[1] == 1:
        terms = ledger.squeeze(1)
        return terms if constant is None else terms + constant
    return accumulate_logdet_op(ledger, ledger.new_zeros(()) if constant is None else constant)
