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
where logdet_z is that of the forward map. J is triangular in the order of the degrees, so the solve
takes one product with the network's transposed Jacobian for each degree, on one graph.

Shapes: x, z (N, D); params (N, 2 D), raw scales then shifts, or (N, D * numbers), the raw numbers
of each variable in a row; contexts (N, units). float32 or float64; logdet (N,) has the same dtype.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mflow_kernels.ops import cpu
from mflow_kernels.ops.coupling import couple_ref
from mflow_kernels.ops.launch import transformed
from mflow_kernels.ops.masked_network import Degrees, Operation, masked_weights, network_ref
from mflow_kernels.ops.precision import autocasts
from mflow_kernels.ops.rational_quadratic import apply_spline
from mflow_kernels.ops.registration import eager_function, refuse_second_derivative
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.ops.spline import Spline

Transform = ScaleFunction | Spline


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


def masked_autoregressive(
    x: Tensor,
    operations: Sequence[Operation],
    transform: Transform,
    contexts: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """z and logdet (N,) of x (N, D), in one pass of the network. Gradients are autograd's."""
    return elementwise(x, network_ref(operations, x, contexts), transform, False)


def masked_autoregressive_inverse_ref(
    z: Tensor,
    operations: Sequence[Operation],
    transform: Transform,
    contexts: Sequence[Tensor],
    degrees: Tensor,
) -> tuple[Tensor, Tensor]:
    """x and the logdet (N,) of the inverse, by one pass for each degree, in plain torch.

    Args:
        degrees: the degree of each variable, (D,), on z's device.
    """
    weights = masked_weights(operations)
    x, logdet = torch.zeros_like(z), z.new_zeros(len(z))
    for degree in range(int(degrees.max()) + 1):
        params = network_ref(operations, x, contexts, weights)
        found, logdet = elementwise(z, params, transform, True)
        # What is not known yet stays 0, so that no garbage overflows.
        x = torch.where(degrees <= degree, found, x)
    return x, logdet


def _tensors(operations: Sequence[Operation]) -> list[Tensor]:
    """The tensors that have gradients."""
    names = ("weight", "bias")
    found = (getattr(o, name, None) for o in operations for name in names)
    return [t for t in found if t is not None]


def _with_tensors(operations: Sequence[Operation], tensors: Sequence[Tensor]) -> list[Operation]:
    """The operations with these in place of `_tensors(operations)`."""
    rest = iter(tensors)
    made = []
    for o in operations:
        new = {n: next(rest) for n in ("weight", "bias") if getattr(o, n, None) is not None}
        made.append(o._replace(**new) if new else o)  # type: ignore[arg-type]
    return made


def _spread(per_variable: Tensor, transform: Transform) -> Tensor:
    """(N, D) repeated for the params of each variable."""
    if isinstance(transform, Spline):
        return per_variable.repeat_interleave(transform.numbers, 1)
    return per_variable.repeat(1, 2)


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inverse: "MaskedInverse",
        operations: Sequence[Operation],
        transform: Transform,
        contexts: int,
        z: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x, logdet = inverse.run(z, operations, transform, tensors[:contexts])
        ctx.how = operations, transform, contexts, inverse.degrees.count
        ctx.save_for_backward(x, *tensors)
        return x, logdet

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dlogdet: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("masked_autoregressive_inverse")
        operations, transform, count, degrees = ctx.how
        x, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[5:]
        with torch.enable_grad():
            at, *leaves = (t.detach() for t in (x, *tensors))
            at.requires_grad_()
            for leaf, wanted in zip(leaves, needed, strict=True):
                leaf.requires_grad_(wanted)
            own = _with_tensors(operations, leaves[count:])
            params = network_ref(own, at, leaves[:count])
            x_alone, params_alone = x.detach().requires_grad_(), params.detach().requires_grad_()
            z, logdet = elementwise(x_alone, params_alone, transform, False)
        alone = x_alone, params_alone
        # Each z_i depends on its own x_i and params alone.
        slope, of_params = torch.autograd.grad(z, alone, torch.ones_like(z), retain_graph=True)
        log_slope, log_of_params = torch.autograd.grad(logdet, alone, dlogdet)
        rest = dx - log_slope
        v, dparams = torch.zeros_like(x), log_of_params
        for _ in range(degrees if params.requires_grad else 1):
            # Each product makes v right for one more degree, from the last to the first.
            (products,) = torch.autograd.grad(
                params, at, dparams, retain_graph=True, allow_unused=True
            )
            last = v
            v = (rest if products is None else rest - products) / slope
            dparams = log_of_params + of_params * _spread(v, transform)
            if torch.equal(v, last):
                break
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(
            torch.autograd.grad(params, wanted, -dparams, allow_unused=True) if wanted else ()
        )
        grads = (next(found) if leaf.requires_grad else None for leaf in leaves)
        return (None, None, None, None, v, *grads)


class MaskedInverse:
    """The inverse of `masked_autoregressive`. It keeps what the masks and the weights determine
    until one of them changes.

    One object serves one network: the operations of a call may have other tensors than those of the
    last one, but are otherwise the same.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.degrees: Degrees | None = None
        self._masks: list[Tensor] = []
        self._mask_versions: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: dict[str, Any]) -> None:
        self._forget()

    def read_masks(
        self, operations: Sequence[Operation], transform: Transform, features: int
    ) -> Degrees:
        """The degrees in the masks.

        Raises:
            ValueError: the masks are not triangular in any order of the variables.
        """
        found = (getattr(o, name, None) for o in operations for name in ("mask", "units"))
        masks = [mask for mask in found if mask is not None]
        if torch.compiler.is_compiling() and self.degrees is not None:
            return self.degrees
        versions = [0 if m.is_inference() else m._version for m in masks]
        same = len(masks) == len(self._masks) and all(map(_is, masks, self._masks))
        if self.degrees is None or not same or versions != self._mask_versions:
            self.degrees = Degrees(operations, features, owners(transform, features))
            self._masks, self._mask_versions = masks, versions
        return self.degrees

    def run(
        self,
        z: Tensor,
        operations: Sequence[Operation],
        transform: Transform,
        contexts: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """x and logdet, without autograd."""
        assert self.degrees is not None
        return masked_autoregressive_inverse_ref(
            z, operations, transform, contexts, self.degrees.variables.to(z.device)
        )

    def __call__(
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
        degrees = self.read_masks(operations, transform, z.shape[1])
        if torch.compiler.is_compiling() or transformed() or autocasts(z.device):
            variables = degrees.variables.to(z.device)
            return masked_autoregressive_inverse_ref(z, operations, transform, contexts, variables)
        tensors = *contexts, *_tensors(operations)
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in (z, *tensors)):
            return self.run(z, operations, transform, contexts)
        x, logdet = _Inverse.apply(self, operations, transform, len(contexts), z, *tensors)
        return x, logdet


def _is(one: Tensor, other: Tensor) -> bool:
    return one is other
