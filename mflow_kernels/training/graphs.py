"""The forward and backward pass as two CUDA graphs: two launches for any depth and width.

torch.cuda.make_graphed_callables cannot be used before torch 2.14, because it captures in the
global mode. In that mode, a thread that pins memory, such as one that reads the next batches, fails
and makes the capture fail too.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mflow_kernels.layers import ReversibleChain
from mflow_kernels.ops.launch import cusolver

_WARM_UP = 3  # passes before the capture, in which libraries, compilers and autotuners initialize

Losses = Callable[..., tuple[Tensor, ...]]


def can_capture(device: torch.device) -> bool:
    """Whether passes on this device can be captured."""
    return device.type == "cuda"


class Captured(NamedTuple):
    """Two graphs, and the tensors that each replay overwrites with the results of the passes."""

    forward: torch.cuda.CUDAGraph
    losses: tuple[Tensor, ...]
    backward: torch.cuda.CUDAGraph
    gradients: tuple[Tensor, ...]


def capture(
    forward: Callable[[], tuple[Tensor, ...]],
    backward: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]],
) -> Captured:
    """Capture both passes after a warm-up. `backward` takes the results of `forward`.

    Raises:
        RuntimeError: something in the passes cannot be captured. The failed capture is cleaned up.
    """
    # Warm-up and captures share a stream, because cuBLAS and cuSOLVER initialize for each stream.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle()
    how: dict[str, Any] = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
    try:
        # If the end of a capture fails, torch.cuda.graph does not restore the stream; this does.
        with cusolver(), torch.cuda.stream(stream):
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


def _abandon(graphs: Sequence[torch.cuda.CUDAGraph], pool: Any) -> None:
    """Clean up after a capture that failed: finish its work, and take torch out of the capture.

    If CUDA refuses to end a capture, the generator and the allocator of torch 2.9 stay in it. Later
    versions of torch leave it by themselves, either immediately or in `reset`.
    """
    torch.cuda.synchronize()  # the warm-up may still write to buffers that are restored or freed
    for graph in graphs:
        graph.reset()
    device = torch.cuda.current_device()
    # The generator would refuse to draw. A clone of its state is not part of the capture.
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())
    # The allocator would never free memory again, and `empty_cache` would raise.
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # the allocator has left the capture already
        return
    torch._C._cuda_releasePool(device, pool)


class StepGraphs:
    """Computes the losses of each stage with graphs, which it captures at the stage's first batch.

    Batches of another shape are computed without graphs. If a capture fails, it prints the reason
    and computes everything without graphs from then on.
    """

    def __init__(self) -> None:
        self._stage: int | None = None
        self._graphed: _Graphed | None = None
        self._failed = False

    def __call__(
        self, stage: int, batch: Sequence[Tensor], losses: Losses, modules: Sequence[nn.Module]
    ) -> tuple[Tensor, ...]:
        """Return losses(*batch): the loss, then tensors without gradients.

        With graphs, the next call overwrites these tensors.

        Args:
            stage: number of the stage. When it changes, the graphs are captured again.
            batch: the data and, for a class-conditional model, its classes.
            losses: function to compute. It must not read from the device or draw random numbers.
                It may change buffers of `modules` in place.
            modules: modules with all parameters that the loss depends on; these get gradients.
        """
        if stage != self._stage:
            if self._graphed is not None:  # free its memory before the next capture
                for parameter in self._graphed.parameters:
                    parameter.grad = None  # it is in the graph's memory
            self._stage, self._graphed = stage, None
            if not self._failed:
                self._capture(batch, losses, modules)
        if self._graphed is None or not self._graphed.takes(batch):
            return losses(*batch)
        return self._graphed(batch)

    def _capture(
        self, batch: Sequence[Tensor], losses: Losses, modules: Sequence[nn.Module]
    ) -> None:
        buffers = [buffer for module in modules for buffer in module.buffers()]
        before = [buffer.clone() for buffer in buffers]
        try:
            self._graphed = _Graphed(batch, losses, nn.ModuleList(modules))
        except RuntimeError as error:
            self._failed = True  # the next stage could not be captured either
            # After an operator fails, the end of the capture fails too; report the first error.
            first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            reason = str(first).partition("\n")[0]
            print(f"training continues without CUDA graphs: {reason}", file=sys.stderr)
        finally:
            for buffer, value in zip(buffers, before, strict=True):  # undo the warm-up
                buffer.copy_(value)


class _Graphed:
    """The captured losses and gradients for batches of one shape."""

    def __init__(self, batch: Sequence[Tensor], losses: Losses, modules: nn.Module) -> None:
        # A rank's share of a batch is not dense. Keep its strides: sums on a CPU follow them.
        self._batch = [x.new_empty_strided(x.shape, x.stride()).copy_(x) for x in batch]
        dloss = batch[0].new_ones(())
        parameters = [p for p in modules.parameters() if p.requires_grad]
        chains = [m for m in modules.modules() if isinstance(m, ReversibleChain)]

        def backward(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            gradients = torch.autograd.grad(results[0], parameters, dloss)
            return *gradients, *(c.drift for c in chains if c.drift is not None)

        self.captured = capture(lambda: losses(*self._batch), backward)
        self.dloss, self.parameters = dloss, parameters
        self._drifting = [chain for chain in chains if chain.drift is not None]

    def takes(self, batch: Sequence[Tensor]) -> bool:
        """Whether the batch has the shapes and dtypes of the captured one."""
        return [(x.shape, x.dtype) for x in batch] == [(x.shape, x.dtype) for x in self._batch]

    def __call__(self, batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for own, x in zip(self._batch, batch, strict=True):
            own.copy_(x)
        return _Replay.apply(self, *self.parameters)

    def gradients(self) -> list[Tensor]:
        """Replay the backward graph, set the chains' drift as a backward pass does, and return the
        gradients of the parameters."""
        self.captured.backward.replay()
        count = len(self.parameters)
        drifts = self.captured.gradients[count:]
        for chain, drift in zip(self._drifting, drifts, strict=True):
            chain.drift = drift
        # Autograd takes detached tensors as gradients without a copy.
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
