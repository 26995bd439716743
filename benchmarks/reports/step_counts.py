"""Count every kernel that a GPU would run, without a GPU.

`count(function)` runs a function on CPU tensors and returns one `Kernel` for each launch that the
same code would make on CUDA. The package's own kernels are counted from the launches that they
make: the launch is recorded and nothing runs. Torch's operators are counted by a dispatch mode,
under these rules:

- Views, allocations and metadata are free.
- Any other operator is one launch. It reads each tensor that it is given once and writes each
  tensor that it returns or changes once. An expanded tensor has the bytes of its memory, not of its
  shape.
- A convolution is one launch of cuDNN, and its bias another, which reads and writes the result. Its
  backward is one launch each for the gradients of input, weight and bias. `cudnn_convolution_relu`
  is one launch, bias and ReLU included.
- cuDNN runs in channels_last if its input or its weight is in channels_last. A tensor in the
  other layout is converted first, one launch that reads and writes it.
- `pixel_shuffle` and `pixel_unshuffle` are one copy, and their result is contiguous, as on CUDA.
- Operators on uint8 alone handle the state of the host's random generator; they do not count.
- A library call on small matrices (an inverse, a triangular solve) is one launch, which is a lower
  bound.

Convolutions, and operators on large states, compute nothing. They return memory that is never
written, in the layout that CUDA gives, so that a count of a large model takes seconds and little
memory. Values are therefore meaningless; shapes, dtypes and layouts are those of a GPU.
"""

from benchmarks.reports import aot  # isort: skip - before anything of mflow_kernels

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.reports.package_launches import flops_of, results_of
from mflow_kernels.ops import coupling_network, coupling_network_launches
from mflow_kernels.reversible import rearrangements
from mflow_kernels.reversible.instructions import Call
from mflow_kernels.reversible.rerun import RerunCall

FREE = ("empty", "new_empty", "detach", "alias", "lift_fresh", "resize_", "set_", "_unsafe_view",
        "_local_scalar_dense", "_reshape_alias")  # fmt: skip
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation")
NETWORKS, FLOW, OTHER = "networks", "flow kernels", "other"
PARTS = (NETWORKS, FLOW, OTHER)


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: of torch's operator or of the package's kernel.
        part: "networks" (coupling networks, forward and backward), "flow kernels" (everything else
            over tensors with pixels) or "other" (weights, sums over samples).
        side: height of the images it works on; 1 for vectors; 0 for tensors without pixels.
        read, written: bytes.
        flops: floating point operations of products and convolutions, two for a multiplication and
            its addition.
        dtype: of its largest tensor, which determines how fast a GPU multiplies.
    """

    name: str
    part: str
    side: int
    read: int
    written: int
    flops: int
    dtype: torch.dtype

    @property
    def moved(self) -> int:
        return self.read + self.written


def nbytes(x: Tensor) -> int:
    """Return the bytes of the memory behind a tensor's elements: an expanded axis counts once."""
    numbers = math.prod(n for n, s in zip(x.shape, x.stride(), strict=True) if s or n < 2)
    return numbers * x.element_size()


class _Counter(TorchDispatchMode):
    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.part: str | None = None  # of the network that runs; None outside of networks
        self.images = images

    def add(self, name: str, inputs: list[Tensor], outputs: list[Tensor], flops: int = 0) -> None:
        tensors = [t for t in (*inputs, *outputs) if t.numel()]
        if not tensors or all(t.dtype == torch.uint8 for t in tensors):
            return
        largest = max(tensors, key=nbytes)
        side = max(
            (t.shape[-1] if t.dim() > 2 else 1 for t in tensors if self.has_pixels(t)), default=0
        )
        part = self.part or (FLOW if side else OTHER)
        self.kernels.append(
            Kernel(name, part, side, sum(map(nbytes, inputs)), sum(map(nbytes, outputs)), flops,
                   largest.dtype)
        )  # fmt: skip

    def has_pixels(self, x: Tensor) -> bool:
        """Return whether x is a state, params or a hidden tensor. A vector has one pixel."""
        if x.dim() != self.images.dim() or len(x) != len(self.images):
            return False
        return x.dim() == 2 or (
            x.shape[2] == x.shape[3] <= self.images.shape[2] and x.shape[2] != 3
        )

    def convert(self, x: Tensor, channels_last: bool) -> None:
        """Count a copy if x is not in the layout that the convolution runs in."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        if not x.is_contiguous(memory_format=layout):
            self.add("layout conversion", [x], [x])

    def convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any, fused: bool = False
    ) -> Tensor:
        last = _channels_last(x, weight)
        for t in (x, weight):
            self.convert(t, last)
        shape = torch.ops.aten.convolution.default(
            x.to("meta"), weight.to("meta"), None, *rest
        ).shape
        layout = torch.channels_last if last else torch.contiguous_format
        y = torch.empty(shape, dtype=x.dtype, memory_format=layout)
        if fused and bias is not None:
            self.add("convolution, bias and ReLU", [x, weight, bias], [y], _flops(y, weight))
            return y
        self.add("convolution", [x, weight], [y], _flops(y, weight))
        if bias is not None:
            self.add("convolution bias", [y, bias], [y])
        return y

    def convolution_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        *_, (needs_x, needs_weight, needs_bias) = rest
        last = _channels_last(x, weight)
        for t in (dy, x, weight):
            self.convert(t, last)
        dx = dweight = dbias = None
        if needs_x:
            dx = torch.empty_like(x)
            self.add("convolution dx", [dy, weight], [dx], _flops(dy, weight))
        if needs_weight:
            dweight = torch.empty_like(weight)
            self.add("convolution dw", [dy, x], [dweight], _flops(dy, weight))
        if needs_bias:
            dbias = dy.new_empty(dy.shape[1])
            self.add("convolution db", [dy], [dbias])
        return dx, dweight, dbias

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name == "convolution":
            return self.convolution(*args)
        if name == "cudnn_convolution_relu":
            x, weight, bias, stride, padding, dilation, groups = args
            rest = (stride, padding, dilation, False, [0, 0], groups)
            return self.convolution(x, weight, bias, *rest, fused=True)
        if name == "convolution_backward":
            return self.convolution_backward(*args)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        given = list({id(t): t for t in given}.values())
        if any(self.has_pixels(t) and nbytes(t) > LARGE for t in given) and not function.is_view:
            out = _without_computing(function, args, kwargs, given)
        else:
            out = function(*args, **kwargs)
        if function.is_view or name.startswith(FREE):
            return out
        if name in ("pixel_shuffle", "pixel_unshuffle"):
            out = out.contiguous()
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if name in ("copy_", "fill_", "zero_"):  # their target is not read
            given = given[1:]
        elif name == "_foreach_copy_":
            written, given = args
        flops = 0
        if name in PRODUCTS:
            flops = 2 * written[0].numel() * given[-1].shape[-2]
        self.add(name, given, written, flops)
        return out


LARGE = 2**20  # bytes


def _without_computing(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]
) -> Any:
    """Run an operator on the meta device. Return results in memory that nothing writes."""
    metas = {id(t): torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
             for t in given}  # fmt: skip
    originals = {id(metas[id(t)]): t for t in given}
    on_meta = {k: torch.device("meta") if isinstance(v, torch.device) else v
               for k, v in kwargs.items()}  # fmt: skip
    out = function(*_swapped(args, metas), **_swapped(on_meta, metas))

    def real(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        if id(t) in originals:  # changed in place
            return originals[id(t)]
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)

    return tree_map(real, out)


def _swapped(tree: Any, metas: dict[int, Tensor]) -> Any:
    return tree_map(lambda t: metas[id(t)] if isinstance(t, Tensor) else t, tree)


def _channels_last(x: Tensor, weight: Tensor) -> bool:
    """Return whether cuDNN runs a convolution in channels_last (torch's rule, ConvUtils.h)."""
    return any(
        t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
        for t in (x, weight)
    )


def _flops(y: Tensor, weight: Tensor) -> int:
    return 2 * y.numel() * math.prod(weight.shape[1:])


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


def count(function: Callable[[], object], module: nn.Module, images: Tensor) -> list[Kernel]:
    """Return every kernel that `function` would launch on a GPU, in order.

    Args:
        function: runs on CPU tensors; its results are meaningless.
        module: the model that it runs; kernels of its coupling networks are counted
            separately.
        images: a batch of its data, images (N, C, H, W) or vectors (N, C). Images whose side is 3
            would be taken for weights.
    """
    counter = _Counter(images)

    def note(launch: aot.Launch) -> None:
        tensors = {n: t for n, t in launch.bound.items() if isinstance(t, Tensor)}
        written = results_of(launch)
        counter.add(
            launch.kernel.__name__.strip("_"),
            [t for n, t in tensors.items() if n not in written],
            [t for n, t in tensors.items() if n in written],
            flops_of(launch),
        )

    def product(a: Tensor, b: Tensor) -> Tensor:  # one launch on CUDA; CPUs lack the operator
        out = torch.empty(len(a), b.shape[1])
        counter.add("mm", [a, b], [out], 2 * out.numel() * len(b))
        return out

    with (
        _marked_networks(module, counter),
        patch.object(coupling_network_launches, "product_in_float32", product),
        patch.object(coupling_network, "_has_cudnn", lambda device: True),
        patch.object(rearrangements, "_computes_on_cpu", lambda x: False),
        counter,
        aot.noting(note),
    ):
        for net in networks(module):
            # Later steps know from the first one that the network draws no random numbers.
            RerunCall(Call(net, net)).remember(draws=False)
        function()
    return counter.kernels
