"""Forward and backward pass as CUDA graphs: two launches, whatever the model's depth and width.

torch.cuda.make_graphed_callables does this too, but, before torch 2.14, only in the capture mode in
which memory that another thread pins, as those that read the next batches do, breaks the capture
and that thread.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mflow_kernels.layers import ReversibleChain

_WARM_UP = 3  # passes in which libraries, compilers and autotuners set themselves up

Losses = Callable[[Tensor], tuple[Tensor, ...]]


class Captured(NamedTuple):
    """Two graphs, and the memory in which each replay leaves what the passes returned."""

    forward: torch.cuda.CUDAGraph
    losses: tuple[Tensor, ...]
    backward: torch.cuda.CUDAGraph
    gradients: tuple[Tensor, ...]


def capture(
    forward: Callable[[], tuple[Tensor, ...]],
    backward: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]],
) -> Captured:
    """Capture both passes, the second of which takes what the first returned, after a warm-up.

    Raises:
        RuntimeError: something in them cannot be captured. Nothing of the capture is left.
    """
    # One stream for all: cuBLAS and cuSOLVER set themselves up for each.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle()
    how: dict[str, Any] = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
    try:
        # torch.cuda.graph does not leave its stream where the end of a capture fails; this does.
        with _cusolver(), torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                backward(forward())
            with torch.cuda.graph(graphs[0], **how):
                losses = forward()
            with torch.cuda.graph(graphs[1], **how):
                gradients = backward(losses)
    except RuntimeError:
        _abandon(graphs, pool)
        raise
    torch.cuda.current_stream().wait_stream(stream)
    return Captured(graphs[0], tuple(loss.detach() for loss in losses), graphs[1], gradients)


@contextmanager
def _cusolver() -> Iterator[None]:
    """MAGMA, which some torch takes for many matrices at once, waits for the device."""
    before = torch.backends.cuda.preferred_linalg_library()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*preferred_linalg_library is an experimental")
        torch.backends.cuda.preferred_linalg_library("cusolver")
        try:
            yield
        finally:
            torch.backends.cuda.preferred_linalg_library(before)


def _abandon(graphs: Sequence[torch.cuda.CUDAGraph], pool: Any) -> None:
    """After a capture that failed: no work of it runs on, and torch is out of it.

    Where CUDA refuses to end a capture, torch 2.9 stays inside of it in two places; later ones get
    out by themselves, at once or in `reset`.
    """
    torch.cuda.synchronize()  # the warm-up may still write what is put back now, or is freed
    for graph in graphs:
        graph.reset()
    device = torch.cuda.current_device()
    # The generator would refuse to draw; a copy of its state has not heard of the capture.
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())
    # The allocator would never again give memory back, and `empty_cache` would raise.
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # it is out of it
        return
    torch._C._cuda_releasePool(device, pool)


class StepGraphs:
    """Computes the losses of one stage after another by graphs, each captured at its first batch.

    A batch of another shape than that one is computed without. So is everything once a capture has
    failed, which is printed.
    """

    def __init__(self) -> None:
        self._stage: int | None = None
        self._graphed: _Graphed | None = None
        self._failed = False

    def __call__(
        self, stage: int, x: Tensor, losses: Losses, modules: Sequence[nn.Module]
    ) -> tuple[Tensor, ...]:
        """losses(x): the loss, and tensors without gradients.

        With graphs, they are where the next call will leave its own.

        Args:
            stage: where it is another than before, graphs are captured anew.
            x: a batch.
            losses: may read nothing from the device and draw no random number. It may change
                buffers of `modules`, in place.
            modules: the parameters whose gradients the loss is to have; all that it depends on.
        """
        if stage != self._stage:
            if self._graphed is not None:  # its memory is given back first
                for parameter in self._graphed.parameters:
                    parameter.grad = None  # lies in it
            self._stage, self._graphed = stage, None
            if not self._failed:
                self._capture(x, losses, modules)
        if self._graphed is None or self._graphed.x.shape != x.shape:
            return losses(x)
        return self._graphed(x)

    def _capture(self, x: Tensor, losses: Losses, modules: Sequence[nn.Module]) -> None:
        buffers = [buffer for module in modules for buffer in module.buffers()]
        before = [buffer.clone() for buffer in buffers]
        try:
            self._graphed = _Graphed(x, losses, nn.ModuleList(modules))
        except RuntimeError as error:
            self._failed = True  # what cannot be captured now cannot be in the next stage
            # Where an operator is refused, so is the end of the capture, which tells nothing.
            first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            reason = str(first).partition("\n")[0]
            print(f"training goes on without CUDA graphs: {reason}", file=sys.stderr)
        finally:
            for buffer, value in zip(buffers, before, strict=True):  # the warm-up was no step
                buffer.copy_(value)


class _Graphed:
    """The losses of batches of one shape, and their gradients."""

    def __init__(self, x: Tensor, losses: Losses, modules: nn.Module) -> None:
        # Strides too, by which sums on a CPU are ordered: a rank's share of a batch is not dense.
        self.x = x.new_empty_strided(x.shape, x.stride()).copy_(x)
        dloss = x.new_ones(())
        parameters = [p for p in modules.parameters() if p.requires_grad]
        chains = [m for m in modules.modules() if isinstance(m, ReversibleChain)]

        def backward(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            gradients = torch.autograd.grad(results[0], parameters, dloss)
            return *gradients, *(c.drift for c in chains if c.drift is not None)

        self.captured = capture(lambda: losses(self.x), backward)
        self.dloss, self.parameters = dloss, parameters
        self._drifting = [chain for chain in chains if chain.drift is not None]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        self.x.copy_(x)
        return _Replay.apply(self, *self.parameters)

    def gradients(self) -> list[Tensor]:
        """Of the parameters, by the backward graph; sets the chains' drift as backward does."""
        self.captured.backward.replay()
        count = len(self.parameters)
        drifts = self.captured.gradients[count:]
        for chain, drift in zip(self._drifting, drifts, strict=True):
            chain.drift = drift
        # Detached, they are autograd's to take as they are, without a copy.
        return [gradient.detach() for gradient in self.captured.gradients[:count]]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphed: _Graphed, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.graphed = graphed
        graphed.captured.forward.replay()
        loss, *others = (result.detach() for result in graphed.captured.losses)
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        graphed: _Graphed = ctx.graphed
        graphed.dloss.copy_(dloss)
        return None, *graphed.gradients()
