"""One account of what code does on a device: its kernels, their bytes and products, its memory.

`Account` is a dispatch mode. On meta tensors, which have no memory, it sees every operator that
code calls and every launch of this package, and nothing is computed. (Fake tensors know devices and
autocast, but take ten times as long.) It counts under these rules:

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
- Memory is that of the tensors which operators return, in the allocator's units, from the operator
  that makes it until the last reference is gone. Memory inside of torch's operators and libraries
  does not count.
- A value that the host reads from a meta tensor is 1 or True.
"""

import gc
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mflow_kernels.ops.launch import Walk, walking
from mflow_kernels.ops.registration import COMPUTATIONS

FREE = ("empty", "new_empty", "detach", "alias", "lift_fresh", "resize_", "set_", "_unsafe_view",
        "_local_scalar_dense", "_reshape_alias")  # fmt: skip
UNIT = 512  # bytes; the CUDA allocator rounds up to multiples of it


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: of torch's operator or of the package's kernel.
        read, written: bytes.
        flops: floating point operations of products and convolutions, two for a multiplication and
            its addition.
        dtype: of its largest tensor, which determines how fast a GPU multiplies.
    """

    name: str
    read: int
    written: int
    flops: int
    dtype: torch.dtype

    @property
    def moved(self) -> int:
        return self.read + self.written


def nbytes(x: Tensor) -> int:
    """Return the bytes of the memory behind a tensor's elements: an expanded axis counts once."""
    if 0 not in x.stride():
        return x.nbytes
    numbers = math.prod(n for n, s in zip(x.shape, x.stride(), strict=True) if s or n < 2)
    return numbers * x.element_size()


class Account(TorchDispatchMode):
    """Counts the kernels and the memory of the code that runs inside of this context.

    Args:
        gpu: whether the tensors stand for a GPU's.
        card: the GPU; None for a Hopper card.

    Attributes:
        kernels: what a GPU launches, in order.
        purpose: of the memory that is allocated next.
        held: bytes in use now, by purpose; `at_peak` at the moment when most were in use.
    """

    def __init__(self, gpu: bool, card: torch.device | None = None) -> None:
        super().__init__()
        self.gpu, self.card, self.purpose = gpu, card, ""
        self.kernels: list[Kernel] = []
        self.held, self.at_peak = Counter[str](), Counter[str]()
        self._total = self._peak = 0
        self._forms: dict[Any, Any] = {}  # of operators' results, by that of their arguments
        self._alive: dict[int, tuple[weakref.ref[Any], str, int]] = {}

    def launched(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Do nothing; called with each launch of Triton."""

    def add(
        self, name: str, read: Sequence[Tensor], written: Sequence[Tensor], flops: int = 0
    ) -> None:
        """Count one launch."""
        tensors = [t for t in (*read, *written) if t.numel()]
        if not tensors or all(t.dtype == torch.uint8 for t in tensors):
            return
        largest = max(tensors, key=nbytes)
        moved = sum(map(nbytes, read)), sum(map(nbytes, written))
        self.kernels.append(Kernel(name, *moved, flops, largest.dtype))

    def allocated(self, x: Tensor) -> None:
        """Count the memory of x, unless it is known."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        if self.gpu:
            size = -(-size // UNIT) * UNIT
        self._alive[key] = weakref.ref(storage, lambda _: self._freed(key)), self.purpose, size
        self.held[self.purpose] += size
        self._total += size
        if self._total > self._peak:
            self._peak, self.at_peak = self._total, self.held.copy()

    def _freed(self, key: int) -> None:
        _, purpose, size = self._alive.pop(key)
        self.held[purpose] -= size
        self._total -= size

    def belongs(self, x: Tensor, purpose: str) -> None:
        """Say what the memory of x is for."""
        key = x.untyped_storage()._cdata
        reference, before, size = self._alive[key]
        self._alive[key] = reference, purpose, size
        self.held[before] -= size
        self.held[purpose] += size

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        rule, kwargs = _rule(function), kwargs or {}
        if rule.own is not None:
            with self:  # the tensors and launches inside of the operator
                return rule.own(*args, **kwargs)
        if rule.name == "_local_scalar_dense" and args[0].is_meta:  # item()
            return 1.0 if args[0].is_floating_point() else 1
        if rule.is_view:
            return function(*args, **kwargs)
        count = _COUNTED.get(rule.name, Account._any)
        out = count(self, function, *args, **kwargs)
        for t in _tensors(out):
            self.allocated(t)
        return out

    def run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return an operator's results."""
        rule = _rule(function)
        # Some operators take 1 ms on meta tensors, so the form of their result is computed once.
        key = function, _form(args), _form([*kwargs.items()])
        if rule.is_new and (forms := self._forms.get(key)) is not None:
            made = [
                torch.empty_strided(shape, stride, dtype=dtype, device=device)
                for shape, stride, dtype, device in forms[1]
            ]
            return tuple(made) if forms[0] else made[0]
        out = function(*args, **kwargs)
        results = out if isinstance(out, tuple) else (out,)
        if results and all(isinstance(t, Tensor) and t.is_meta for t in results):
            self._forms[key] = isinstance(out, tuple), [_form(t) for t in results]
        return out

    def _any(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        rule, out = _rule(function), self.run(function, args, kwargs)
        if rule.is_free:
            return out
        name = rule.name
        if name in ("pixel_shuffle", "pixel_unshuffle") and self.gpu:
            out = out.contiguous()
        given = list({id(t): t for t in (*_tensors(args), *_tensors(kwargs.values()))}.values())
        in_lists = out is None and name.startswith(("_foreach", "_fused"))
        written = [*_tensors(args[0] if in_lists else out)]
        if name in ("copy_", "fill_", "zero_"):  # their target is not read
            given = given[1:]
        elif name == "_foreach_copy_":
            written, given = args
        formula, flops = flop_registry.get(function.overloadpacket), 0
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=out)
        elif name == "_addmm_activation":
            flops = 2 * out.numel() * args[1].shape[-1]
        self.add(name, given, written, flops)
        return out

    def _convert(self, x: Tensor, channels_last: bool) -> None:
        """Count a copy if x is not in the layout that the convolution runs in."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        if not x.is_contiguous(memory_format=layout):
            self.add("layout conversion", [x], [x])

    def _convolution(
        self, function: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        y = self._convolved(x, weight, *rest)
        self.add("convolution", [x, weight], [y], _flops(y, weight))
        if bias is not None:
            self.add("convolution bias", [y, bias], [y])
        return y

    def _cudnn_convolution_relu(
        self, function: Any, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any
    ) -> Tensor:
        stride, padding, dilation, groups = rest
        y = self._convolved(x, weight, stride, padding, dilation, False, [0, 0], groups)
        self.add("convolution, bias and ReLU", [x, weight, bias], [y], _flops(y, weight))
        return y

    def _convolved(self, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        last = _channels_last(x, weight)
        for t in (x, weight):
            self._convert(t, last)
        on_meta = (torch.empty_like(t, device="meta") for t in (x, weight))
        shape = torch.ops.aten.convolution.default(*on_meta, None, *rest).shape
        layout = torch.channels_last if last else torch.contiguous_format
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)

    def _convolution_backward(
        self, function: Any, dy: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        *_, (needs_x, needs_weight, needs_bias) = rest
        last = _channels_last(x, weight)
        for t in (dy, x, weight):
            self._convert(t, last)
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


_COUNTED: dict[str, Callable[..., Any]] = {
    "convolution": Account._convolution,
    "convolution_backward": Account._convolution_backward,
    "cudnn_convolution_relu": Account._cudnn_convolution_relu,
}


@contextmanager
def _casting_layers() -> Iterator[None]:
    """Within this context, torch's layers cast meta tensors as autocast would, which does not know
    them. A mode of torch functions would be off in backward passes."""
    # Autocast casts a weight once, and the graph holds the result.
    weights = weakref.WeakValueDictionary[int, Tensor]()

    def cast(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32 or not x.is_meta:
            return x
        dtype = torch.get_autocast_dtype("cpu")
        if not (x.is_leaf and x.requires_grad and torch.is_autocast_cache_enabled()):
            return x.to(dtype)
        if (known := weights.get(id(x))) is None:
            known = weights[id(x)] = x.to(dtype)
        return known

    def casting(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tuple(map(cast, args)), {k: cast(v) for k, v in kwargs.items()}
            if args[0].is_meta and layer is attention and len(args) == 3 and not kwargs:
                return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
            return layer(*args, **kwargs)

        return run

    attention = F.scaled_dot_product_attention  # on the meta device it would not be a fused one
    layers = {name: getattr(F, name) for name in _LAYERS}
    try:
        for name, layer in layers.items():
            setattr(F, name, casting(layer))
        yield
    finally:
        for name, layer in layers.items():
            setattr(F, name, layer)


_LAYERS = ("linear", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention")


@contextmanager
def counting(account: Account) -> Iterator[None]:
    """Within this context, the account sees operators and launches."""
    collects = gc.isenabled()
    gc.disable()  # memory is freed where references end, on every walk at the same place
    try:
        walk = Walk(account.gpu, account.add, account.launched, account.card)
        with _casting_layers(), account, walking(walk):
            yield
    finally:
        if collects:
            gc.enable()


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in an operator's arguments or results, which are lists at most."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Iterable) and not isinstance(tree, str):
        for part in tree:
            if isinstance(part, Tensor | list | tuple):
                yield from _tensors(part)


def _form(tree: Any) -> Any:
    """Return shapes, strides, dtypes and devices in a tree of arguments or results, as a key."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.stride(), tree.dtype, tree.device
    if isinstance(tree, list | tuple):
        return tuple(map(_form, tree))
    return type(tree), tree


class _Rule(NamedTuple):
    """How to count an operator.

    Attributes:
        own: the computation of one of the package's operators.
        is_view: its result has the memory of its argument.
        is_free: it reads and writes no memory.
        is_new: its results have memory of their own.
    """

    name: str
    own: Callable[..., Any] | None
    is_view: bool
    is_free: bool
    is_new: bool


@cache
def _rule(function: Any) -> _Rule:
    name, schema = function.overloadpacket.__name__, function._schema
    is_view = function.is_view or name in ("detach", "alias", "set_")
    return _Rule(
        name,
        COMPUTATIONS.get(schema.name),
        is_view,
        is_view or name.startswith(FREE),
        name != "_unsafe_view" and not any(a.alias_info for a in schema.arguments),
    )


def _channels_last(x: Tensor, weight: Tensor) -> bool:
    """Return whether cuDNN runs a convolution in channels_last (torch's rule, ConvUtils.h)."""
    return any(
        t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
        for t in (x, weight)
    )


def _flops(y: Tensor, weight: Tensor) -> int:
    return 2 * y.numel() * math.prod(weight.shape[1:])
