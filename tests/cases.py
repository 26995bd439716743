"""Shapes, layouts, operators and comparisons that tests of operators, layers and models share."""

import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness.inputs import Draw
from benchmarks.harness.table import OPERATORS, Operator
from mflow_kernels.ops.conv1x1 import conv1x1_op, spread
from mflow_kernels.ops.coupling import affine_coupling_op
from mflow_kernels.ops.coupling_conv1x1 import coupling_conv1x1_op
from mflow_kernels.ops.launch import KERNELS_ON_CPU
from mflow_kernels.ops.layouts import dense_pixels, pixels
from mflow_kernels.ops.precision import accumulator
from mflow_kernels.ops.scale import ScaleFunction, log_scale_ref
from mflow_kernels.testing import assert_close

Module = TypeVar("Module", bound=nn.Module)

# Marks tests of compilers, which see operators and not their kernels. `test_opcheck` compares what
# operators declare with what their kernels return.
compiles = pytest.mark.skipif(KERNELS_ON_CPU, reason="compilers do not see the kernels")
# Marks tests that say nothing about kernels that other tests do not say.
not_about_kernels = pytest.mark.skipif(KERNELS_ON_CPU, reason="other tests compare the kernels")
# With kernels, `opcheck` makes only the checks that depend on what computes the results.
OPCHECKS: dict[str, Any] = (
    {"test_utils": ("test_schema", "test_faketensor")} if KERNELS_ON_CPU else {}
)

# Vectors; odd numbers of channels and pixels; N = 1; P = 1; more channels than a block of a kernel
# has; P larger than a tile and not a multiple of it (tiles have 16 to 256 columns).
SHAPES = [
    (2, 5),
    (1, 2),
    (33, 3),
    (1, 2, 1),
    (2, 3, 9),
    (2, 12, 5, 7),
    (1, 4, 1, 1),
    (2, 33, 3, 5),
    (1, 130, 3, 3),
    (2, 6, 17, 16),
    (1, 5, 2, 3, 4),
    (3, 2, 8, 8),
]
# The C++ loops also run vectors and rows longer than a tile of 1,024 elements and not a multiple of
# it, rows of few channels, and more channels than a tile. An interpreter would take minutes.
LONG_SHAPES = [(700, 3), (2, 4, 1100), (1, 2, 40, 30), (2, 17, 9, 8), (2, 2101), (1, 2101, 2)]
LONG_SHAPES = [] if KERNELS_ON_CPU else LONG_SHAPES
# Large enough for gradients of weights in several parts, which the loops add.
PARTED_SHAPES = [] if KERNELS_ON_CPU else [(2, 20, 48, 70)]
IMAGES = [(2, 7, 5, 6), (1, 4, 9, 8)]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "first half": lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
    "second half": lambda x: torch.cat([x + 1, x], 1)[:, x.shape[1] :],
    "first half, channels_last": lambda x: torch.cat([x, x + 1], 1).contiguous(
        memory_format=torch.channels_last
    )[:, : x.shape[1]],
    "second half, channels_last": lambda x: torch.cat([x + 1, x], 1).contiguous(
        memory_format=torch.channels_last
    )[:, x.shape[1] :],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}
# Kernels read these layouts in place, and a contiguous copy of others.
IN_PLACE = [name for name in LAYOUTS if name != "transposed"]


def layouts_of(shape: tuple[int, ...]) -> list[str]:
    """The layouts that a state of this shape can have."""
    return list(LAYOUTS) if len(shape) == 4 else ["contiguous"]


# Dtypes of a state and of its coupling's params.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]

SCALES = [
    ScaleFunction("sigmoid"),
    ScaleFunction("sigmoid", eps=1e-3, order="scale-shift"),
    ScaleFunction("double-sigmoid"),
    ScaleFunction("double-sigmoid", order="scale-shift"),
    ScaleFunction("softplus"),
    ScaleFunction("softplus", eps=1e-3, clamp=math.log(3), order="scale-shift"),
    ScaleFunction("exp"),
    ScaleFunction("exp", order="scale-shift"),
    ScaleFunction("tanh", clamp=1.5),
    ScaleFunction("tanh", order="scale-shift"),
    ScaleFunction("atan", clamp=1.9),
    ScaleFunction("atan", order="scale-shift"),
    ScaleFunction("softsign", clamp=6.9, order="scale-shift"),
]


def normal(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = "contiguous",
) -> Tensor:
    """Draw normal numbers in a layout of LAYOUTS, the same on every device."""
    return LAYOUTS[layout](torch.randn(shape, dtype=torch.float64).to(device, dtype))


def on_tensor_cores(device: torch.device) -> bool:
    """Whether products round as on tensor cores: on a GPU, and under MFLOW_PTX."""
    return device.type == "cuda" or "MFLOW_PTX" in os.environ


def perturbed(module: Module, by: float = 0.1) -> Module:
    """Add normal numbers to the parameters of a module; flows start close to the identity."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape).to(parameter))
    return module


class Calls(TorchDispatchMode):
    """Record the operators that run, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append((func, args))
        return func(*args, **(kwargs or {}))


class HostReads(TorchDispatchMode):
    """Record the torch operators that would make the host wait for a GPU.

    It works on a CPU too. Operators on uint8 tensors do not count: those are generator states,
    which are in host memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __enter__(self) -> "HostReads":
        self._tolist = Tensor.tolist

        def tolist(t: Tensor) -> Any:  # not an operator that __torch_dispatch__ sees
            self.found.append("tolist")
            return self._tolist(t)

        Tensor.tolist = tolist  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Tensor.tolist = self._tolist  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        reads = func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
        )
        # Indexing by a mask must count its True elements.
        reads |= "index" in str(func) and any(t.dtype == torch.bool for t in tensors[1:])
        if reads and all(t.dtype != torch.uint8 for t in tensors):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def launched(module: Any, patch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Record the options of a module's launches, by kernel, instead of running them."""
    seen: dict[str, dict[str, Any]] = {}
    patch.setattr(module, "launch", lambda f, *_, **options: seen.update({f.__name__: options}))
    return seen


def allocated(call: Callable[[], Any]) -> tuple[Any, int]:
    """The result of `call`, and the number of bytes that it allocated."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    return result, sum(
        max(event.self_cpu_memory_usage, 0) + max(event.self_device_memory_usage, 0)
        for event in profile.events()
    )


# Every operator that autograd differentiates, and those of them that map a state to a state.
DIFFERENTIABLE = {op.id: op for op in OPERATORS if op.differentiable}
FLOW_OPERATORS = {name: op for name, op in DIFFERENTIABLE.items() if op.maps_states}
REBUILDING = [op for op in OPERATORS if not op.differentiable]  # of a reversible backward pass


def sample(
    op: Operator,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    device: torch.device | str = "cpu",
    layout: str = "contiguous",
) -> dict[str, Tensor]:
    """Draw inputs that require gradients, for a state of `shape` in `layout`."""
    return op.draw(Draw(shape, dtypes, device, LAYOUTS[layout]))


def skip_if_slow(op: Operator, shape: tuple[int, ...]) -> None:
    """Skip splines of many elements in interpreters, which take seconds for each. Their tiles are
    those of the other elementwise operators."""
    if KERNELS_ON_CPU and {"numbers", "numbers_b"} & {*op.inputs} and math.prod(shape) > 300:
        pytest.skip("slow in interpreters")


def learned(inputs: dict[str, Tensor]) -> list[Tensor]:
    """The inputs that require gradients."""
    return [t for t in inputs.values() if t.requires_grad]


def growth(params: Tensor, scale: ScaleFunction) -> float:
    """The largest of s and 1 / s of a coupling. It may multiply rounding errors by this factor."""
    raw = params.detach().double().chunk(2, dim=1)[0]
    return log_scale_ref(raw, scale).abs().max().exp().item()


def options(op: Operator, scale: ScaleFunction | None = None) -> dict[str, ScaleFunction]:
    return {"scale": scale or ScaleFunction("tanh")} if "scale" in op.options else {}


def assert_matches(
    op: Operator, inputs: dict[str, Tensor], scale: ScaleFunction | None = None
) -> None:
    """Assert that an operator's values and gradients agree with its float64 reference, and that its
    results have the right layout and dtype."""
    exact = {
        k: v.detach().double().requires_grad_() if v.is_floating_point() else v
        for k, v in inputs.items()
    }
    actual = op.call(*inputs.values(), **options(op, scale))
    expected = op.expected(*exact.values(), **options(op, scale))
    x = inputs["x"]
    terms = op.terms(x.shape[0], x.shape[1], pixels(x))
    for name, got, want in zip(op.results, actual, expected, strict=True):
        if name == "y":
            assert got.dtype == x.dtype
            assert got.stride() == torch.empty_like(dense_pixels(x)).stride()
            assert_close(got, want, terms=terms[name], name=name)
        else:
            # The terms are of order one, and their sum may cancel to less.
            assert got.dtype == accumulator(x.dtype)
            assert_close(got, want, terms=terms[name], scale=1.0, name=name)

    # Round the cotangents to the dtype of the outputs, so both sides see the same numbers.
    cotangents = [torch.randn_like(y, dtype=torch.float64).to(y.dtype) for y in actual]
    grads = torch.autograd.grad(actual, learned(inputs), cotangents)
    wants = torch.autograd.grad(expected, learned(exact), [g.double() for g in cotangents])
    names = [name for name, t in inputs.items() if t.requires_grad]
    for name, got, want in zip(names, grads, wants, strict=True):
        assert got.dtype == inputs[name].dtype
        assert_close(got, want, terms=terms[name], name=f"d {name}")


def eager_form(op: Operator, net_dtype: torch.dtype | None) -> Callable[..., tuple[Tensor, ...]]:
    """A product or coupling as layers call it, past the dispatcher. It returns the results of the
    operator, and those of a product are followed by the input of the next network."""
    products = {"conv1x1": conv1x1_op.eager, "coupling_conv1x1": coupling_conv1x1_op.eager}

    def call(x: Tensor, *others: Tensor, scale: ScaleFunction | None = None) -> tuple[Tensor, ...]:
        states = [dense_pixels(t) for t in (x, *others[: "params" in op.inputs])]
        how = (*scale.args, op.inverse) if scale else ()
        if op.name not in products:
            y, ledger = affine_coupling_op.eager(*states, *how)
            return y, ledger.sum(1)
        weights = spread(*others[-2:], x)
        y, net, *ledger = products[op.name](*states, *weights, "tf32x3", net_dtype, *how)
        return y, *(entries.sum(1) for entries in ledger), net

    return call
