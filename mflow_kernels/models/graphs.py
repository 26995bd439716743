"""The forward and backward pass of a training step as two CUDA graphs.

Each is one launch of the host, for any depth and width. torch.cuda.make_graphed_callables cannot be
used before torch 2.14, because it captures in the global mode. In that mode, a thread that pins
memory, such as one that reads the next batches, fails and makes the capture fail too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from mflow_kernels.layers import ReversibleChain
from mflow_kernels.ops.checks import check_device
from mflow_kernels.ops.launch import cusolver
from mflow_kernels.ops.precision import without_autocast
from mflow_kernels.reversible.graph import nodes_behind
from mflow_kernels.reversible.modes import autocast_state

LossFn = TypeVar("LossFn", bound=Callable[..., Any])

_WARM_UP = 3  # passes before the capture, in which libraries, compilers and autotuners initialize


class CaptureError(RuntimeError):
    """A loss cannot be captured in a CUDA graph."""


def graphed(model: nn.Module, loss_fn: LossFn) -> LossFn:
    """Return `loss_fn` with its forward and backward pass as two CUDA graphs.

    A GPU then does not wait for the host, which launches two graphs instead of hundreds of kernels.
    On other devices, `loss_fn` is called as it is. Only these two passes are captured. Everything
    else in a training loop stays as it is: gradient scaling, accumulation and clipping, the
    optimizer and its learning rate, the exchange of gradients between ranks.

    The first call runs `loss_fn` itself, which initializes what waits for a first batch. The second
    call with a batch of the same shapes runs it a few more times, which times the candidates of
    each kernel, then captures it. These runs leave no trace in buffers and generators. Later calls
    replay the graphs. A call computes without graphs if its batch has other shapes or dtypes, as
    the last one of an epoch, or if gradients are not recorded. If parameters or buffers were moved,
    replaced, frozen or released, or the modes of modules or of autocast changed, the graphs are
    captured again.

    A replay runs no Python code. What `loss_fn` reads from Python, such as the weight of a term, is
    fixed in the graphs; what changes between steps must be an argument. Random numbers are drawn
    from the device's default generator; those of a replay are the ones that a call would draw. The
    gradients that `torch.autograd.grad` returns are overwritten by the next backward pass, as those
    of `torch.cuda.make_graphed_callables` are; `parameter.grad` is not.

    Args:
        model: module with all parameters that the loss depends on, such as a model of this package
            or an accelerated one. Several are passed as an `nn.ModuleList`.
        loss_fn: function of a batch, loss_fn(*batch), with tensors of any shapes and dtypes on the
            device of the parameters. It returns the loss, or a tuple of the loss and tensors
            without gradients. It must not read from the device (`item`, `print`, a branch on a
            tensor).

    Returns:
        A function with the arguments and results of `loss_fn`. Each of its losses can be
        differentiated once, before the next call.

    Raises:
        TypeError: `model` is no module, or `loss_fn` no function. At a call: an argument is no
            tensor, or the results are no tensors.
        ValueError: `model` has no parameters or contains a DistributedDataParallel, which must
            instead contain the graphed loss. At a call: an argument is on another device, or a
            result after the loss requires gradients.
        RuntimeError: at the call that captures: `loss_fn` reads from the device, draws random
            numbers on the host, replaces a buffer, changes a parameter, or depends on a parameter
            that is not in `model`. At a backward pass: it is the second one of a loss, or a later
            call came before it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn: expected a function, got {type(loss_fn).__name__}")
    if next(model.parameters(), None) is None:
        raise ValueError("model: expected a module with parameters, got none")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "model: expected a module without DistributedDataParallel; wrap a module whose forward "
            "calls the graphed loss instead"
        )
    return cast(LossFn, _Graphed(model, loss_fn))


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
    except Exception:
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


class _Graphed:
    """A loss that captures its passes when a batch has the shapes of the first one."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any]) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._modules: list[nn.Module] = []
        self._owners: list[dict[str, Any]] = []  # of their parameters and buffers
        self._state: Any = None  # what the graphs depend on, after the first call
        self._shapes: Any = None  # of the first batch
        self._passes: _Passes | None = None

    def __call__(self, *batch: Tensor) -> Any:
        for i, x in enumerate(batch):
            if not isinstance(x, Tensor):
                raise TypeError(f"argument {i}: expected a torch.Tensor, got {type(x).__name__}")
        parameter = next(self._model.parameters())
        device = parameter.device
        if not can_capture(device) or not torch.is_grad_enabled():
            return self._run(batch)
        for i, x in enumerate(batch):
            check_device(f"argument {i}", x, parameter)
        if self._state is not None and self._state != self._state_now(device):
            self._state = self._passes = None
        shapes = [(x.shape, x.dtype, x.requires_grad) for x in batch]
        if self._state is None:
            results = self._run(batch)
            self._modules = list(self._model.modules())
            self._owners = [o for m in self._modules for o in (m._parameters, m._buffers) if o]
            self._state, self._shapes = self._state_now(device), shapes
            return results
        if shapes != self._shapes:
            return self._run(batch)
        if self._passes is None:
            self._passes = self._capture(batch, device)
        return self._passes(batch)

    def _run(self, batch: Sequence[Tensor]) -> Any:
        results = self._loss_fn(*batch)
        _results(results)
        return results

    def _state_now(self, device: torch.device) -> Any:
        tensors = [t for owner in self._owners for t in owner.values() if t is not None]
        return (
            list(map(id, tensors)),
            [t.data_ptr() for t in tensors],
            [t.requires_grad for t in tensors],
            [m.training for m in self._modules],
            autocast_state(device),
        )

    def _capture(self, batch: Sequence[Tensor], device: torch.device) -> "_Passes":
        chains = [m for m in self._modules if isinstance(m, ReversibleChain)]
        drifts = [chain.drift for chain in chains]
        buffers = list(self._model.buffers())
        before = [buffer.clone() for buffer in buffers]
        try:
            with (
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                torch.cuda.device_of(next(self._model.parameters())),
            ):
                return _Passes(self._model, self._loss_fn, batch, chains)
        except RuntimeError as error:
            # After an operator fails, the end of the capture fails too; report the first error.
            first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            reason = str(first).partition("\n")[0]
            raise CaptureError(f"loss_fn cannot be captured in a CUDA graph: {reason}") from error
        finally:  # undo the warm-up
            torch.clear_autocast_cache()  # it may hold weights in the graph's memory
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)
            for chain, drift in zip(chains, drifts, strict=True):
                chain.drift = drift


class _Passes:
    """The captured passes for batches of one shape."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        batch: Sequence[Tensor],
        chains: Sequence[ReversibleChain],
    ) -> None:
        self.batch = [_static(x) for x in batch]
        self.parameters = _parameters_of(model, loss_fn, self.batch)
        self.inputs = [x for x in self.batch if x.requires_grad]
        self._drifting: list[ReversibleChain] = []
        self.turn = 0  # counts the passes that ran
        wanted = [*self.inputs, *self.parameters]
        dlosses: list[Tensor] = []

        def forward() -> tuple[Tensor, ...]:
            for chain in chains:
                chain.drift = None
            torch.clear_autocast_cache()  # weights cast by an earlier pass are not the graph's
            found = loss_fn(*self.batch)
            self._is_tuple = isinstance(found, tuple)
            return _results(found)

        def backward(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if not dlosses:
                dlosses.append(torch.ones_like(results[0].detach()))
            # A loop calls backward() outside of autocast.
            with _without_hooks(self.parameters), without_autocast(results[0]):
                gradients = torch.autograd.grad(results[0], wanted, dlosses[0])
            self._drifting = [chain for chain in chains if chain.drift is not None]
            return *gradients, *(cast(Tensor, chain.drift) for chain in self._drifting)

        self.captured = capture(forward, backward)
        (self._dloss,) = dlosses

    def __call__(self, batch: Sequence[Tensor]) -> Any:
        inputs = [x for x in batch if x.requires_grad]
        results = _Replay.apply(self, batch, *inputs, *self.parameters)
        return results if self._is_tuple else results[0]

    def forward(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """Replay the forward graph, and return copies of its results."""
        for own, x in zip(self.batch, batch, strict=True):
            own.copy_(x)
        self.turn += 1
        self.captured.forward.replay()
        return [result.clone() for result in self.captured.losses]

    def backward(self, dloss: Tensor, turn: int) -> list[Tensor]:
        """Replay the backward graph, record the chains' drift, and return the gradients.

        Those of parameters are in the graph's memory: autograd takes detached tensors as gradients
        without a copy.
        """
        if turn != self.turn:
            raise RuntimeError(
                "a graphed loss can be differentiated once, before the next call; its activations "
                "are overwritten. Add several losses in loss_fn, or call backward() for each"
            )
        self.turn += 1
        count, found = len(self.inputs), self.captured.gradients
        gradients = found[count : count + len(self.parameters)]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            held = parameter.grad  # of the pass before, to which this pass adds
            if held is not None and held.data_ptr() == gradient.data_ptr():
                parameter.grad = held.clone()
        self._dloss.copy_(dloss)
        self.captured.backward.replay()
        drifts = found[count + len(self.parameters) :]
        for chain, drift in zip(self._drifting, drifts, strict=True):
            chain.record_drift(drift.clone())
        return [*(g.clone() for g in found[:count]), *(g.detach() for g in gradients)]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, passes: _Passes, batch: Sequence[Tensor], *_: Tensor
    ) -> tuple[Tensor, ...]:
        loss, *others = passes.forward(batch)
        ctx.passes, ctx.turn = passes, passes.turn
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.passes.backward(dloss, ctx.turn)


def _results(found: Any) -> tuple[Tensor, ...]:
    """Check what a loss function returned, and return it as a tuple."""
    results = found if type(found) is tuple else (found,)
    kinds = ", ".join(type(result).__name__ for result in results)
    if not results or not all(isinstance(result, Tensor) for result in results):
        raise TypeError(f"loss_fn: expected a tensor or a tuple of tensors, got {kinds or '()'}")
    if any(result.requires_grad for result in results[1:]):
        raise ValueError(
            "loss_fn: expected results without gradients after the loss, got one that requires "
            "gradients; detach it, or add it to the loss"
        )
    return results


def _static(x: Tensor) -> Tensor:
    """Memory for a batch. Its strides stay, because the sums of some kernels follow them."""
    x, requires_grad = x.detach(), x.requires_grad
    own = x.clone() if 0 in x.stride() else x.new_empty_strided(x.shape, x.stride()).copy_(x)
    return own.requires_grad_(requires_grad)


def _parameters_of(
    model: nn.Module, loss_fn: Callable[..., Any], batch: Sequence[Tensor]
) -> list[nn.Parameter]:
    """The parameters that get gradients of the loss. Runs `loss_fn` twice.

    Raises:
        RuntimeError: a replay would not do what these runs do.
    """
    known = dict(model.named_parameters())
    versions = {name: parameter._version for name, parameter in known.items()}
    buffers, host = dict(model.named_buffers()), torch.get_rng_state()
    runs = []
    for _ in range(2):
        loss, *_others = _results(loss_fn(*batch))
        if not loss.requires_grad:
            raise RuntimeError("the loss does not require gradients")
        leaves = (getattr(node, "variable", None) for node in nodes_behind([loss]))
        runs.append({id(leaf): leaf for leaf in leaves if leaf is not None})
    for name, buffer in model.named_buffers():
        if buffers.get(name) is not buffer:
            raise RuntimeError(f"it replaces the buffer {name}; it must change it in place")
    for name, parameter in known.items():
        if parameter._version != versions[name]:
            raise RuntimeError(f"it changes the parameter {name}")
    devices = {str(parameter.device) for parameter in known.values()}
    if len(devices) > 1:
        raise RuntimeError(f"its parameters are on several devices: {', '.join(sorted(devices))}")
    if devices != {"cpu"} and not torch.equal(host, torch.get_rng_state()):
        raise RuntimeError("it draws random numbers on the CPU, which a replay would not draw")
    expected = {id(t) for t in (*known.values(), *batch)}
    for key, leaf in runs[0].items():
        if key in runs[1] and key not in expected:  # else the run itself made it
            raise RuntimeError(
                f"it depends on a tensor of shape {tuple(leaf.shape)} that requires gradients and "
                "is no parameter of the model"
            )
    return [p for p in known.values() if id(p) in runs[0]]


@contextmanager
def _without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let hooks on gradients of parameters run only outside of the graph."""
    hooks = [parameter._backward_hooks for parameter in parameters]
    try:
        for parameter in parameters:
            parameter._backward_hooks = None
        yield
    finally:
        for parameter, own in zip(parameters, hooks, strict=True):
            parameter._backward_hooks = own
