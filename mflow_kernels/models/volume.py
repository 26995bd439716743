r"""The log-volume of an embedding u -> x: 1/2 log det J^T J with J = dx/du (D, d).

Both methods multiply by J without finite differences. Forward-mode differentiation computes J v;
operators and chains run as plain torch in it. The model's own backward pass computes J^T w.

    exact       d products J e_j, then the sum of log |diag R| from J = Q R; exact up to rounding.
    hutchinson  log det M = tr log M = E[z^T log(M) z] over Rademacher probes z, with M = J^T J.
                The Lanczos matrix of M and z gives z^T log(M) z (stochastic Lanczos quadrature,
                Ubaru, Chen and Saad 2017). Conjugate gradients use the same matrix, so the same
                steps also give y = M^-1 z and with it the gradient (rectangular flows, Caterini et
                al., arXiv 2106.01413, section 4): 1/2 d log det M = E[(J y) . (dJ z)].
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mflow_kernels.ops.precision import without_autocast

Method = Literal["exact", "hutchinson"]
Decode = Callable[..., Tensor]

# Largest number of elements of x in one pass through a model. Hidden activations have about ten to
# a hundred times as many elements, so a pass takes at most a few hundred MB.
PASS_ELEMENTS = 2**18


class Estimate(NamedTuple):
    """An estimate `value` (N,) in nats, and its standard error `error` (N,), 0 if it is exact."""

    value: Tensor
    error: Tensor


def log_volume(
    decode: Decode,
    u: Tensor,
    dimensions: int,
    method: Method = "exact",
    *,
    context: Tensor | None = None,
    probes: int = 16,
    iterations: int = 64,
    generator: torch.Generator | None = None,
    max_bytes: int = 2**30,
) -> Estimate:
    """Return 1/2 log det J^T J (N,) of `decode` at u, in nats.

    `Chart.manifold_log_prob` describes and checks the other arguments.

    Args:
        decode: maps (N, d) to (N, *), sample by sample, with plain torch and this package's layers.
        u: (N, d).
        dimensions: D >= d, the number of elements that `decode` returns per sample.
        context: (N, *), passed to `decode` as the keyword `context`, if given.
    """
    n, d = u.shape
    if n == 0 or d == 0:
        return Estimate(u.new_zeros(n), u.new_zeros(n))

    def exact(decode: Decode, u: Tensor) -> tuple[Tensor, Tensor]:
        hint = "; method='hutchinson' estimates the log-determinant in less memory"
        found = jacobians(decode, u, dimensions, max_bytes, hint)
        diagonals = [torch.linalg.qr(j).R.diagonal(dim1=1, dim2=2) for j in found]
        value = torch.cat(diagonals).abs().log().sum(1)
        return value, torch.zeros_like(value)

    def stochastic(decode: Decode, u: Tensor) -> tuple[Tensor, Tensor]:
        n = len(u)
        z = random_signs(n * probes, u, generator)
        rows = u.repeat_interleave(probes, 0)

        def half_log(nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            logs = nodes.clamp(min=torch.finfo(nodes.dtype).tiny).log()
            return mean_over_probes((weights * logs).sum(1).view(n, probes) / 2)

        value, error, solution = lanczos(metric(decode, rows.detach()), z, half_log, iterations)
        value = value.to(u.dtype)
        if torch.is_grad_enabled():
            with torch.no_grad():
                solved = push_forward(decode, rows, solution)
            # The difference below is 0 and only carries the gradient.
            surrogate = (solved * push_forward(decode, rows, z)).sum(1).view(n, probes).mean(1)
            value = value + (surrogate - surrogate.detach())
        return value, error

    if method == "exact":
        return for_each_context(exact, n, decode, u, context)
    most = max(1, PASS_ELEMENTS // (dimensions * probes))
    return for_each_context(stochastic, most, decode, u, context)


def for_each_context(
    estimate: Callable[[Decode, Tensor], tuple[Tensor, Tensor]],
    most: int,
    decode: Decode,
    u: Tensor,
    context: Tensor | None,
) -> Estimate:
    """Return the values and errors `estimate(decode, u)`, for at most `most` samples at a time.

    With a context (N, *), one sample at a time: an estimate decodes each sample many times.
    """

    def of_row(row: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        return estimate(lambda u: decode(u, context=own.expand(len(u), *own.shape[1:])), row)

    with without_autocast(u):  # autocast's rounding would spoil the result
        if context is None:
            parts = [estimate(decode, part) for part in u.split(most)]
        else:
            parts = list(map(of_row, u.split(1), context.split(1)))
    value, error = (torch.cat(column).to(u.dtype) for column in zip(*parts, strict=True))
    return Estimate(value, error)


def jacobians(
    decode: Decode, u: Tensor, dimensions: int, max_bytes: int, hint: str = ""
) -> Iterator[Tensor]:
    """Yield J (n, D, d) of `decode` at u (N, d) in float64, for n samples at a time.

    The arguments are those of `log_volume`.

    Raises:
        ValueError: one Jacobian needs more than max_bytes or, if gradients are enabled, all N of
            them do. The message ends with `hint`.
    """
    n, d = u.shape
    samples = n if torch.is_grad_enabled() else 1
    needed = 8 * samples * dimensions * d
    if needed > max_bytes:
        count = f"{samples} at once, for their gradients" if samples > 1 else "one at a time"
        raise ValueError(
            f"max_bytes: expected at least {needed:,} for exact Jacobians of {dimensions} x {d} in "
            f"float64 ({count}), got {max_bytes:,}{hint}"
        )
    for part in u.split(
        max(1, min(PASS_ELEMENTS // dimensions, max_bytes // (8 * dimensions * d)))
    ):
        columns: list[Tensor] = []
        size = max(1, PASS_ELEMENTS // (len(part) * dimensions))  # columns per pass
        for unit in torch.eye(d, dtype=u.dtype, device=u.device).split(size):
            k = len(unit)
            pushed = push_forward(decode, part.repeat(k, 1), unit.repeat_interleave(len(part), 0))
            columns += pushed.double().unflatten(0, (k, len(part))).unbind()
        yield torch.stack(columns, dim=2)


def push_forward(decode: Decode, u: Tensor, v: Tensor) -> Tensor:
    """Return J v (N, D) at u; the result is differentiable."""
    with forward_ad.dual_level():
        x = forward_ad.unpack_dual(decode(forward_ad.make_dual(u, v)))
        tangent = torch.zeros_like(x.primal) if x.tangent is None else x.tangent
        return tangent.flatten(1)


def random_signs(rows: int, u: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw Rademacher probes (rows, d) for latents u (N, d)."""
    bits = torch.randint(0, 2, (rows, u.shape[1]), generator=generator, device=u.device)
    return (2 * bits - 1).to(u.dtype)


def metric(decode: Decode, u: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function v -> J^T J v at u; v and its image are (N, d)."""
    with torch.enable_grad():
        u_leaf = u.clone().requires_grad_()
        x = decode(u_leaf)

    def multiply(v: Tensor) -> Tensor:
        pushed = push_forward(decode, u, v).view_as(x)
        return torch.autograd.grad(x, u_leaf, pushed, retain_graph=True)[0]

    return multiply


@torch.no_grad()
def lanczos(
    multiply: Callable[[Tensor], Tensor],
    z: Tensor,
    estimate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return an estimate from z^T f(M) z and its error, (N,) float64 each, and M^-1 z.

    Every Lanczos vector is orthogonalized against all earlier ones. The iteration stops when
    further steps would change no estimate by more than a tenth of its error; the remaining change
    is added to the error.

    Args:
        multiply: maps v to M v; both are (rows, d).
        z: (rows, d), the first vectors.
        estimate: maps the nodes and weights (rows, k) of Gauss quadrature to the estimate and its
            error, (N,) each: for any function f, z^T f(M) z is about the sum of weights * f(nodes).
    """
    rows, d = z.shape
    length = z.norm(dim=1)
    any_direction = torch.full_like(z, 1 / math.sqrt(d))  # of the weight 0
    q = torch.where(length[:, None] > 0, z / length[:, None], any_direction)
    basis: list[Tensor] = []
    values: list[Tensor] = []
    largest = z.new_zeros(rows, dtype=torch.float64)
    active = torch.ones_like(largest, dtype=torch.bool)
    diagonals: list[Tensor] = []  # of the tridiagonal matrices t (rows, k, k)
    below: list[Tensor] = []
    for _ in range(min(iterations, d)):
        basis.append(q)
        w = multiply(q)
        diagonal = (w * q).sum(1).double()
        # If a row's Krylov space is exhausted, append a decoupled 1, whose weight is 0.
        diagonals.append(torch.where(active, diagonal, 1.0))
        t = torch.diag_embed(torch.stack(diagonals, 1))
        if below:
            side = torch.diag_embed(torch.stack(below, 1), -1)
            t = t + side + side.mT
        nodes, vectors = torch.linalg.eigh(t)
        weights = (length[:, None] * vectors[:, 0]).square()
        value, error = estimate(nodes, weights)
        values.append(value)
        span = torch.stack(basis, 1)
        for _ in range(2):
            w = w - ((span @ w.unsqueeze(2)).mT @ span).squeeze(1)
        largest = torch.maximum(largest, diagonal.abs())
        norm = w.norm(dim=1).double()
        active = active & (norm > 10 * math.sqrt(d) * torch.finfo(z.dtype).eps * largest)
        complete = len(basis) == d or not active.any()
        missing = torch.zeros_like(value) if complete else _missing(values)
        if (missing <= error / 10).all():
            break
        below.append(torch.where(active, norm, 0.0))
        q = torch.where(active, 1 / norm, 0.0).to(z.dtype)[:, None] * w
    first = torch.zeros_like(t[:, :, 0])
    first[:, 0] = length
    along = torch.linalg.solve(t, first).to(z.dtype)
    return value, error + missing, (along[:, None] @ torch.stack(basis, 1)).squeeze(1)


def _missing(values: list[Tensor]) -> Tensor:
    """Estimate how far the last value is from the limit of the sequence.

    This assumes that changes shrink geometrically, by the ratio of the last two changes. The ratio
    is clamped to 0.95, because a larger one is unreliable.
    """
    if len(values) < 3:
        return torch.full_like(values[-1], math.inf)
    before, last = (values[-2] - values[-3]).abs(), (values[-1] - values[-2]).abs()
    ratio = torch.where(before > 0, last / before, 0.0).clamp(max=0.95)
    return last / (1 - ratio)


def mean_over_probes(each: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of (N, probes) over the probes, and the standard error of that mean."""
    return each.mean(1), each.std(1) / math.sqrt(each.shape[1])
