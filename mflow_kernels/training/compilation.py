"""Compiles the Triton kernels of a training run in parallel, before its first step.

Otherwise each kernel is compiled at its first launch, one after the other. A walk through the steps
of all stages finds the launches, and Triton compiles them in threads. The compiled kernels are in
Triton's cache on disk, so the other processes on this machine and later runs read them there.
"""

import sys
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import torch

from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.progress import progress_bar
from mflow_kernels.ops.compiler import TRITON_INSTALLED, triton
from mflow_kernels.runs.config import RunConfig
from mflow_kernels.training.account import Account, counting
from mflow_kernels.training.memory import empty_batch, empty_model, step_of


class _Launches(Account):
    """An account that compiles the kernel of each launch, without launching it."""

    def __init__(self, card: torch.device) -> None:
        super().__init__(gpu=True, card=card)

    def launched(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        kernel.warmup(*args, grid=grid, **options)


def compile_kernels(config: RunConfig, card: torch.device, threads: int | None = None) -> int:
    """Compile the kernels of the training steps and validations of all stages.

    A kernel that cannot be compiled is left to its first launch, which raises the error or chooses
    another implementation.

    Args:
        config: of the run. Its batch is that of one process.
        card: the CUDA device to compile for. In a process where kernels run on the CPU, "cpu" is
            the machine that stands for a GPU.
        threads: number of threads; by default a few more than there are CPUs.

    Returns:
        How many kernels Triton compiled or found in its cache.
    """
    if not TRITON_INSTALLED:
        return 0
    kernels: list[Future[Any]] = []
    with ThreadPoolExecutor(threads) as pool:
        try:
            with triton.AsyncCompileMode(pool) as compiling:
                kernels = compiling.raw_futures
                _walk(config, card)
                with progress_bar("compiling", len(kernels), unit="kernels") as show:
                    for done, _ in enumerate(as_completed(kernels), start=1):
                        show(done)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            print(f"a kernel was not compiled before training: {reason}", file=sys.stderr)
    return len(kernels)


def _walk(config: RunConfig, card: torch.device) -> None:
    """Walk through the launches of training."""
    model = empty_model(config)
    for stage in range(len(config.flows)):
        step_of(config, stage, model, _Launches(card))
    dtype = getattr(torch, config.precision)
    with (
        counting(_Launches(card)),
        torch.no_grad(),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        images, context = empty_batch(config)
        model.log_prob(dequantize(images, config.n_bits), context=context)
