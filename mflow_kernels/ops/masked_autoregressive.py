r"""Masked autoregressive maps of vectors, and their inverse in the multiplications of one pass.

    z_i = T(x_i; params_i(x_<i)),  i = 1..D          logdet = sum over i of log dT/dx_i

T is affine, z = s x + shift with a scale function s(raw), or a monotone rational-quadratic spline.
A masked network (`ops/masked_network.py`) computes all params in one pass. "Before" means in some
order, which the network's masks define.

The inverse is usually computed by D passes of the network, each of which makes one more variable
right. But a hidden unit of degree d never changes once the variables of degrees below d are known.
So, degree by degree, the inverse computes only the units of this degree, from units and variables
that are known, then the params of the variables of this degree, and solves these variables. In all,
each weight is used once.

Gradients of the inverse, with the Jacobian J = dz/dx at the x that was found, g = d loss / dx and
l = d loss / d logdet:
    v = J^-T (g - l d logdet_z/dx),   dz = v,   d theta = -v dz/d theta - l d logdet_z/d theta
where logdet_z is that of the forward map. J is triangular in the order of the degrees. The loop of
csrc runs through the sorted units backwards and solves as it goes, in the work of one backward
pass. Elsewhere the solve takes one product with the network's transposed Jacobian for each degree,
on one graph.

Shapes: x, z (N, D); params (N, 2 D), raw scales then shifts, or (N, D * numbers), the raw numbers
of each variable in a row; contexts (N, units). float32 or float64; logdet (N,) has the same dtype.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mflow_kernels.ops import cpu
from mflow_kernels.ops.coupling import couple_ref
from mflow_kernels.ops.launch import transformed, uses_triton
from mflow_kernels.ops.masked_autoregressive_kernels import launch_inverse
from mflow_kernels.ops.masked_network import (
    Degrees,
    Linear,
    Operation,
    masked_weights,
    network_ref,
    tensors_of,
    with_tensors,
)
from mflow_kernels.ops.precision import accumulator, autocasts
from mflow_kernels.ops.rational_quadratic import apply_spline
from mflow_kernels.ops.registration import eager_function, gradients_of
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.ops.sorted_network import SortedNetwork
from mflow_kernels.ops.spline import Spline

Transform = ScaleFunction | Spline

# The forward map of networks with more units in a hidden layer takes torch's products.
WIDEST = 256


def numbers_of(transform: Transform) -> int:
    """How many params a variable has."""
    return transform.numbers if isinstance(transform, Spline) else 2


def owners(transform: Transform, features: int) -> Tensor:
    """The variable of each of the params."""
    variables = torch.arange(features, device="cpu")
    if isinstance(transform, Spline):
        return variables.repeat_interleave(transform.numbers)
    return variables.repeat(2)


def _affine_forward(
    x: Tensor, params: Tensor, args: tuple[Any, ...], inverse: bool
) -> tuple[Tensor, Tensor]:
    return cpu.change_half("coupling", x, params, args, 0, inverse)


def _affine_setup(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _affine_backward(ctx: Any, dy: Tensor, dledger: Tensor) -> tuple[Tensor | None, ...]:
    x, params = ctx.saved_tensors
    args, inverse = ctx.options
    if torch.is_grad_enabled():
        reference = partial(elementwise, transform=ScaleFunction(*args), inverse=inverse)
        return *gradients_of(reference, (x, params), (dy, dledger[:, 0])), None, None
    found = cpu.change_half_backward("coupling", dy, dledger, x, params, args, 0, inverse)
    return (*found, None, None)


_affine_eager = eager_function(_affine_forward, _affine_setup, _affine_backward)


def elementwise(
    x: Tensor, params: Tensor, transform: Transform, inverse: bool
) -> tuple[Tensor, Tensor]:
    """T of each variable, or its inverse, and the logdet (N,), from checked arguments."""
    if isinstance(transform, Spline):
        return apply_spline(x, params, transform, 0, inverse)
    if cpu.serves(x):
        y, ledger = _affine_eager(x, params, transform.args, inverse)
        return y, ledger[:, 0]
    y, log_s = couple_ref(x, params, transform, inverse)
    return y.to(x.dtype), log_s.sum(1)


def masked_autoregressive_ref(
    x: Tensor,
    operations: Sequence[Operation],
    transform: Transform,
    contexts: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """z and logdet (N,) of x (N, D), in one pass of the network, in plain torch."""
    return elementwise(x, network_ref(operations, x, contexts), transform, False)


def masked_autoregressive_inverse_ref(
    z: Tensor,
    operations: Sequence[Operation],
    transform: Transform,
    contexts: Sequence[Tensor],
    degrees: Degrees,
) -> tuple[Tensor, Tensor]:
    """x and the logdet (N,) of the inverse, by one pass for each degree, in plain torch.

    Args:
        degrees: those of the operations.
    """
    variables = degrees.variables.to(z.device)
    weights = masked_weights(operations)
    x, logdet = torch.zeros_like(z), z.new_zeros(len(z))
    for degree in range(degrees.count):
        params = network_ref(operations, x, contexts, weights)
        found, logdet = elementwise(z, params, transform, True)
        # What is not known yet stays 0, so that no garbage overflows.
        x = torch.where(variables <= degree, found, x)
    return x, logdet


def _spread(per_variable: Tensor, transform: Transform) -> Tensor:
    """(N, D) repeated for the params of each variable."""
    if isinstance(transform, Spline):
        return per_variable.repeat_interleave(transform.numbers, 1)
    return per_variable.repeat(1, 2)


def _inverse_backward(
    dx: Tensor,
    dlogdet: Tensor,
    x: Tensor,
    operations: Sequence[Operation],
    transform: Transform,
    contexts: Sequence[Tensor],
    degrees: int,
) -> tuple[Tensor, ...]:
    """The gradients of z, the contexts and `tensors_of(operations)`, without the loop."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        leaves = [t.detach().requires_grad_() for t in (*contexts, *tensors_of(operations))]
        own = with_tensors(operations, leaves[len(contexts) :])
        params = network_ref(own, at, leaves[: len(contexts)])
        # Each z_i depends on its own x_i and params alone.
        alone = x.detach().requires_grad_(), params.detach().requires_grad_()
        z, logdet = elementwise(*alone, transform, False)
    slope, of_params = torch.autograd.grad(z, alone, torch.ones_like(z), retain_graph=True)
    log_slope, log_of_params = torch.autograd.grad(logdet, alone, dlogdet, materialize_grads=True)
    v, dparams = torch.zeros_like(x), log_of_params
    for _ in range(degrees):
        # Each product makes v right for one more degree, from the last to the first.
        (products,) = torch.autograd.grad(
            params, at, dparams, retain_graph=True, materialize_grads=True
        )
        last, v = v, (dx - log_slope - products) / slope
        dparams = log_of_params + of_params * _spread(v, transform)
        if torch.equal(v, last):
            break
    return v, *torch.autograd.grad(params, leaves, -dparams, allow_unused=True)


class _Map(torch.autograd.Function):
    """The map or its inverse as one node."""

    @staticmethod
    def forward(
        ctx: Any,
        own: "MaskedAutoregression",
        operations: Sequence[Operation],
        transform: Transform,
        contexts: int,
        inverse: bool,
        given: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        result, logdet = own.run(given, operations, transform, tensors[:contexts], inverse)
        ctx.how = own.state(), operations, transform, contexts, inverse
        ctx.save_for_backward(given, result if inverse else given, *tensors)
        return result, logdet

    @staticmethod
    def backward(ctx: Any, dresult: Tensor, dlogdet: Tensor) -> tuple[Tensor | None, ...]:
        (degrees, network, numbers), operations, transform, count, inverse = ctx.how
        given, x, *tensors = ctx.saved_tensors

        def reference(given: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            how = with_tensors(operations, tensors[count:]), transform, tensors[:count]
            if inverse:
                return masked_autoregressive_inverse_ref(given, *how, degrees)
            return masked_autoregressive_ref(given, *how)

        if torch.is_grad_enabled():
            found = gradients_of(reference, (given, *tensors), (dresult, dlogdet))
            return *(None for _ in range(5)), *found
        contexts = tensors[:count]
        if not cpu.serves(given):
            own = with_tensors(operations, tensors[count:])
            found = _inverse_backward(dresult, dlogdet, x, own, transform, contexts, degrees.count)
            return *(None for _ in range(5)), *found
        how = network.plan, numbers, contexts, transform.args, inverse
        dgiven, dnumbers, dcontexts = cpu.masked_map_backward(dresult, dlogdet, given, x, *how)
        of_tensors = network.gradients(tensors[count:], dnumbers)
        return *(None for _ in range(5)), dgiven, *dcontexts, *of_tensors


class MaskedAutoregression:
    """A masked autoregressive map and its inverse. It keeps what the masks determine, and the
    sorted weights, until one of these tensors changes.

    One object serves one network: the operations of a call may have other tensors than those of the
    last one, but are otherwise the same.

    Attributes:
        degrees: the degrees in the masks of the last call.
    """

    degrees: Degrees

    def __init__(self) -> None:
        self._masks = _Kept()
        self._weights = _Kept()
        self._sorted: SortedNetwork | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def _read_masks(
        self, operations: Sequence[Operation], transform: Transform, features: int
    ) -> None:
        found = (getattr(o, name, None) for o in operations for name in ("mask", "units"))
        masks = [mask for mask in found if mask is not None]
        if torch.compiler.is_compiling() and hasattr(self, "degrees"):
            return
        if self._masks.are(masks):
            return
        self.degrees = Degrees(operations, features, owners(transform, features))
        self._sorted, self._weights = None, _Kept()
        self._masks.keep(masks, None)

    def state(self) -> tuple[Degrees, SortedNetwork | None, Tensor | None]:
        """What the last `run` read; the last two are None if it sorted nothing."""
        return self.degrees, self._sorted, self._weights.value

    def run(
        self,
        given: Tensor,
        operations: Sequence[Operation],
        transform: Transform,
        contexts: Sequence[Tensor],
        inverse: bool,
    ) -> tuple[Tensor, Tensor]:
        """The result and its logdet, without autograd."""
        kernel = inverse and uses_triton(given)
        if not kernel and not cpu.serves(given):
            how = operations, transform, contexts
            if not inverse:
                return masked_autoregressive_ref(given, *how)
            return masked_autoregressive_inverse_ref(given, *how, self.degrees)
        if self._sorted is None:
            owner = owners(transform, given.shape[1])
            self._sorted = SortedNetwork(operations, self.degrees, owner)
        tensors = tensors_of(operations)
        if not self._weights.are(tensors):
            like = given.new_empty(0, dtype=accumulator(given.dtype))
            self._weights.keep(tensors, self._sorted.numbers(tensors, like))
        plan, numbers = self._sorted.plan, self._weights.value
        if kernel:
            return launch_inverse(given, self._sorted, numbers, contexts, transform)
        return cpu.masked_map(given, plan, numbers, contexts, transform.args, inverse)

    def forward(
        self,
        x: Tensor,
        operations: Sequence[Operation],
        transform: Transform,
        contexts: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """Return z (N, D) and the logdet (N,) for x (N, D).

        Raises:
            ValueError: the masks are not triangular in any order of the variables.
        """
        wide = any(len(o.weight) > WIDEST for o in operations[:-1] if isinstance(o, Linear))
        if self._is_traced(x) or wide or not cpu.serves(x):
            return masked_autoregressive_ref(x, operations, transform, contexts)
        self._read_masks(operations, transform, x.shape[1])
        return self._apply(x, operations, transform, contexts, False)

    def inverse(
        self,
        z: Tensor,
        operations: Sequence[Operation],
        transform: Transform,
        contexts: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """Return x (N, D), and minus the logdet of the forward map (N,), for z (N, D).

        Raises:
            ValueError: the masks are not triangular in any order of the variables.
        """
        self._read_masks(operations, transform, z.shape[1])
        if self._is_traced(z):
            how = operations, transform, contexts, self.degrees
            return masked_autoregressive_inverse_ref(z, *how)
        return self._apply(z, operations, transform, contexts, True)

    @staticmethod
    def _is_traced(x: Tensor) -> bool:
        """Whether a compiler or transform must see torch's operators, or autocast must cast."""
        return torch.compiler.is_compiling() or transformed() or autocasts(x.device)

    def _apply(
        self,
        given: Tensor,
        operations: Sequence[Operation],
        transform: Transform,
        contexts: Sequence[Tensor],
        inverse: bool,
    ) -> tuple[Tensor, Tensor]:
        tensors = *contexts, *tensors_of(operations)
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in (given, *tensors)):
            return self.run(given, operations, transform, contexts, inverse)
        how = self, operations, transform, len(contexts), inverse
        result, logdet = _Map.apply(*how, given, *tensors)
        return result, logdet


class _Kept:
    """A value that is kept as long as the tensors that determine it do not change."""

    value: Any = None

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []  # so that no other tensor gets their memory
        self._key: list[Any] | None = None

    def are(self, tensors: list[Tensor]) -> bool:
        """Whether these are the tensors, unchanged."""
        return self._key is not None and self._key == _key_of(tensors)

    def keep(self, tensors: list[Tensor], value: Any) -> None:
        self._tensors, self._key, self.value = tensors, _key_of(tensors), value


def _key_of(tensors: list[Tensor]) -> list[Any] | None:
    """What changes if one of these tensors does; None if that cannot be seen."""
    if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
        return None
    return [(t.data_ptr(), t._version, t.shape, t.stride(), t.dtype) for t in tensors]
