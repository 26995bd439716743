"""Count every kernel that a GPU would run, without a GPU.

`count(function)` runs a function on CPU tensors and returns one `Placed` kernel for each launch
that the same code would make on CUDA, by the rules of `training.account`.

Convolutions, and operators on large states, compute nothing. They return memory that is never
written, in the layout that CUDA gives, so that a count of a large model takes seconds and little
memory. Values are therefore meaningless; shapes, dtypes and layouts are those of a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from mflow_kernels.reversible.instructions import Call
from mflow_kernels.reversible.rerun import RerunCall
from mflow_kernels.training.account import Account, Kernel, counting, nbytes

NETWORKS, FLOW, OTHER = "networks", "flow kernels", "other"
PARTS = (NETWORKS, FLOW, OTHER)


@dataclass(frozen=True)
class Placed(Kernel):
    """One launch, and where it belongs.

    Attributes:
        part: "networks" (coupling networks, forward and backward), "flow kernels" (everything else
            over tensors with pixels) or "other" (weights, sums over samples).
        side: height of the images it works on; 1 for vectors; 0 for tensors without pixels.
    """

    part: str
    side: int


class _Counter(Account):
    def __init__(self, images: Tensor) -> None:
        super().__init__(gpu=True)
        self.placed: list[Placed] = []
        self.part: str | None = None  # of the network that runs; None outside of networks
        self.images = images

    def add(
        self, name: str, read: Sequence[Tensor], written: Sequence[Tensor], flops: int = 0
    ) -> None:
        before = len(self.kernels)
        super().add(name, read, written, flops)
        for k in self.kernels[before:]:
            pixels = [t for t in (*read, *written) if t.numel() and self.has_pixels(t)]
            side = max((t.shape[-1] if t.dim() > 2 else 1 for t in pixels), default=0)
            part = self.part or (FLOW if side else OTHER)
            self.placed.append(Placed(k.name, k.read, k.written, k.flops, k.dtype, part, side))

    def has_pixels(self, x: Tensor) -> bool:
        """Return whether x is a state, params or a hidden tensor. A vector has one pixel."""
        if x.dim() != self.images.dim() or len(x) != len(self.images):
            return False
        return x.dim() == 2 or (
            x.shape[2] == x.shape[3] <= self.images.shape[2] and x.shape[2] != 3
        )

    def run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        large = any(self.has_pixels(t) and nbytes(t) > LARGE for t in given)
        if large or function is torch.ops.aten.mm.dtype:  # CPUs lack this product
            return _without_computing(function, args, kwargs)
        return function(*args, **kwargs)


LARGE = 2**20  # bytes


def _without_computing(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the meta device. Return results in memory that nothing writes."""
    originals: dict[int, Tensor] = {}  # by the identity of their counterparts

    def meta(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("meta")
        if not isinstance(value, Tensor):
            return value
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        originals[id(made)] = value
        return made

    def real(t: Tensor) -> Tensor:
        if id(t) in originals:  # changed in place
            return originals[id(t)]
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)

    args, kwargs = tree_map(meta, (args, kwargs))
    return tree_map_only(Tensor, real, function(*args, **kwargs))


@contextmanager
def _marked_networks(module: nn.Module, counter: _Counter) -> Iterator[None]:
    """Within this context, count the kernels of a model's coupling networks as such.

    In the backward pass, hooks on the nodes of a network's graph mark its kernels.
    """
    handles = []

    def enter(*_: Any) -> None:
        counter.part = NETWORKS

    def leave(*_: Any) -> None:
        counter.part = None

    def after(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        counter.part = None
        if isinstance(output, Tensor) and output.grad_fn is not None:
            ends = {t.grad_fn for t in inputs if isinstance(t, Tensor)}
            for node in _graph(output.grad_fn, ends):
                node.register_prehook(enter)
                node.register_hook(leave)

    for net in networks(module):
        handles += [net.register_forward_pre_hook(enter), net.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def networks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the coupling networks of a model of any library.

    They are the `nn.Sequential`s from a convolution or linear layer to another one.
    """
    for child in module.modules():
        if isinstance(child, nn.Sequential) and len(child) > 1:
            ends = child[0], child[-1]
            if all(isinstance(layer, nn.Conv2d | nn.Linear) for layer in ends):
                yield child


def _graph(node: Any, ends: set[Any]) -> Iterator[Any]:
    seen, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node in ends or "Accumulate" in node.name():
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


def count(function: Callable[[], object], module: nn.Module, images: Tensor) -> list[Placed]:
    """Return every kernel that `function` would launch on a GPU, in order.

    Args:
        function: runs on CPU tensors; its results are meaningless.
        module: the model that it runs; kernels of its coupling networks are counted
            separately.
        images: a batch of its data, images (N, C, H, W) or vectors (N, C). Images whose side is 3
            would be taken for weights.
    """
    counter = _Counter(images)
    with _marked_networks(module, counter), counting(counter):
        for net in networks(module):
            # Later steps know from the first one that the network draws no random numbers.
            RerunCall(Call(net, net)).remember(draws=False)
        function()
    return counter.placed
