r"""How much an embedding u -> x stretches volume: 1/2 log det J^T J, J = dx/du (D, d).

Both ways go through products with J and none through finite differences: J v by forward-mode
differentiation (ops and chains run as plain torch there), J^T w by the model's own backward.

    exact       d products J e_j, then log |diag R| of J = Q R: exact to rounding.
    hutchinson  log det M = tr log M = E[z^T log(M) z] over Rademacher probes z, with M = J^T J.
                z^T log(M) z comes from the Lanczos matrix of M and z (stochastic Lanczos
                quadrature, Ubaru, Chen and Saad 2017), which is that of conjugate gradients, so
                that the same steps give y = M^-1 z and with it the gradient (rectangular flows,
                Caterini et al., arXiv 2106.01413, section 4):
                1/2 d log det M = E[(J y) . (dJ z)].
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mflow_kernels.ops.launch import without_autocast

Method = Literal["exact", "hutchinson"]
Decode = Callable[[Tensor], Tensor]

# Numbers of x that one pass of a model computes. A network's hidden channels are some ten to a
# hundred times as many, so that a pass stays below a few hundred MB.
PASS = 2**18


class Estimate(NamedTuple):
    """value (N,) in nats, and error (N,): its standard error, 0 where the value is exact."""

    value: Tensor
    error: Tensor


def log_volume(
    decode: Decode,
    u: Tensor,
    dimensions: int,
    method: Method = "exact",
    *,
    probes: int = 16,
    iterations: int = 64,
    generator: torch.Generator | None = None,
    max_bytes: int = 2**30,
) -> Estimate:
    """1/2 log det J^T J (N,) of decode at u, nats; arguments as for `Chart.manifold_log_prob`,
    which checks them.

    Args:
        decode: (N, d) -> (N, *), each sample on its own, of plain torch and this package's layers.
        u: (N, d).
        dimensions: D >= d, how many numbers decode returns for each sample.
    """
    n, d = u.shape
    if n == 0 or d == 0:
        return Estimate(u.new_zeros(n), u.new_zeros(n))
    with without_autocast(u):  # whose rounding no exact volume would survive
        if method == "exact":
            way_out = "; method='hutchinson' estimates the log-determinant with an error"
            found = jacobians(decode, u, dimensions, max_bytes, way_out)
            value = torch.cat([_log_volume_of(j) for j in found]).to(u.dtype)
            return Estimate(value, torch.zeros_like(value))
        parts = u.split(max(1, PASS // (dimensions * probes)))
        estimates = [_stochastic(decode, part, probes, iterations, generator) for part in parts]
    return Estimate(*(torch.cat(parts) for parts in zip(*estimates, strict=True)))


def jacobians(
    decode: Decode, u: Tensor, dimensions: int, max_bytes: int, way_out: str = ""
) -> Iterator[Tensor]:
    """J (n, D, d) of decode at u (N, d), float64, some n samples at a time; as `log_volume`.

    Raises:
        ValueError: one J, or with gradients the N of them, would take more than max_bytes; the
            message ends with `way_out`.
    """
    n, d = u.shape
    samples = n if torch.is_grad_enabled() else 1
    needed = 8 * samples * dimensions * d
    if needed > max_bytes:
        kept = f"{samples} at once, for their gradients" if samples > 1 else "one at a time"
        raise ValueError(
            f"max_bytes: expected at least {needed:,} for exact Jacobians of {dimensions} x {d} in "
            f"float64 ({kept}), got {max_bytes:,}{way_out}"
        )
    for part in u.split(max(1, min(PASS // dimensions, max_bytes // (8 * dimensions * d)))):
        columns: list[Tensor] = []
        size = max(1, PASS // (len(part) * dimensions))  # columns of a pass
        for unit in torch.eye(d, dtype=u.dtype, device=u.device).split(size):
            k = len(unit)
            pushed = _push(decode, part.repeat(k, 1), unit.repeat_interleave(len(part), 0))
            columns += pushed.double().unflatten(0, (k, len(part))).unbind()
        yield torch.stack(columns, dim=2)


def _push(decode: Decode, u: Tensor, v: Tensor) -> Tensor:
    """J v (N, D) at u, differentiable."""
    with forward_ad.dual_level():
        x = forward_ad.unpack_dual(decode(forward_ad.make_dual(u, v)))
        tangent = torch.zeros_like(x.primal) if x.tangent is None else x.tangent
        return tangent.flatten(1)


def _log_volume_of(jacobian: Tensor) -> Tensor:
    _, r = torch.linalg.qr(jacobian)
    return r.diagonal(dim1=1, dim2=2).abs().log().sum(1)


def _stochastic(
    decode: Decode, u: Tensor, probes: int, iterations: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    n, d = u.shape
    bits = torch.randint(0, 2, (n * probes, d), generator=generator, device=u.device)
    z = (2 * bits - 1).to(u.dtype)
    rows = u.repeat_interleave(probes, 0)
    value, error, solution = _lanczos(_metric(decode, rows.detach()), z, probes, iterations)
    value, error = value.to(u.dtype), error.to(u.dtype)
    if torch.is_grad_enabled():
        with torch.no_grad():
            solved = _push(decode, rows, solution)
        # 0 in value: the gradient alone.
        surrogate = (solved * _push(decode, rows, z)).sum(1).view(n, probes).mean(1)
        value = value + (surrogate - surrogate.detach())
    return value, error


def _metric(decode: Decode, u: Tensor) -> Callable[[Tensor], Tensor]:
    """v -> J^T J v at u, both (N, d)."""
    with torch.enable_grad():
        u_leaf = u.clone().requires_grad_()
        x = decode(u_leaf)

    def multiply(v: Tensor) -> Tensor:
        pushed = _push(decode, u, v).view_as(x)
        return torch.autograd.grad(x, u_leaf, pushed, retain_graph=True)[0]

    return multiply


@torch.no_grad()
def _lanczos(
    multiply: Callable[[Tensor], Tensor], z: Tensor, probes: int, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """1/2 log det M (N,) and its error, float64, and M^-1 z; rows of z (N * probes, d) are probes.

    Lanczos with every vector orthogonalized against all before it. It ends where further steps
    would change no estimate by more than a tenth of its standard error; what they would is part of
    the error.
    """
    rows, d = z.shape
    q = z / math.sqrt(d)
    basis: list[Tensor] = []
    values: list[Tensor] = []
    t = z.new_zeros((rows, 0, 0), dtype=torch.float64)
    coupling = z.new_zeros(rows, dtype=torch.float64)
    largest = torch.zeros_like(coupling)
    going = torch.ones_like(coupling, dtype=torch.bool)
    for _ in range(min(iterations, d)):
        basis.append(q)
        w = multiply(q)
        diagonal = (w * q).sum(1).double()
        # A row whose Krylov space is exhausted goes on with log 1 = 0, decoupled.
        t = _grown(t, torch.where(going, diagonal, 1.0), coupling)
        value, error = _quadrature(t, d, probes)
        values.append(value)
        span = torch.stack(basis, 1)
        for _ in range(2):
            w = w - ((span @ w.unsqueeze(2)).mT @ span).squeeze(1)
        largest = torch.maximum(largest, diagonal.abs())
        norm = w.norm(dim=1).double()
        going = going & (norm > 10 * math.sqrt(d) * torch.finfo(z.dtype).eps * largest)
        complete = len(basis) == d or not going.any()
        missing = torch.zeros_like(value) if complete else _missing(values)
        if (missing <= error / 10).all():
            break
        coupling = torch.where(going, norm, 0.0)
        q = torch.where(going, 1 / norm, 0.0).to(z.dtype)[:, None] * w
    first = torch.zeros_like(t[:, :, 0])
    first[:, 0] = math.sqrt(d)
    weights = torch.linalg.solve(t, first).to(z.dtype)
    return value, error + missing, (weights[:, None] @ torch.stack(basis, 1)).squeeze(1)


def _missing(values: list[Tensor]) -> Tensor:
    """How far the last of these values may be from their limit: changes shrink geometrically, by
    the ratio of the last two (at most 0.95, as far as such a ratio is to be believed)."""
    if len(values) < 3:
        return torch.full_like(values[-1], math.inf)
    before, last = (values[-2] - values[-3]).abs(), (values[-1] - values[-2]).abs()
    ratio = torch.where(before > 0, last / before, 0.0).clamp(max=0.95)
    return last / (1 - ratio)


def _grown(t: Tensor, diagonal: Tensor, coupling: Tensor) -> Tensor:
    """The tridiagonal matrices t (rows, k, k) with one row and column more."""
    k = t.shape[1]
    grown = torch.nn.functional.pad(t, (0, 1, 0, 1))
    grown[:, k, k] = diagonal
    if k:
        grown[:, k, k - 1] = grown[:, k - 1, k] = coupling
    return grown


def _quadrature(t: Tensor, d: int, probes: int) -> tuple[Tensor, Tensor]:
    """1/2 z^T log(M) z by Gauss quadrature: its mean over each sample's probes, and standard
    error."""
    nodes, vectors = torch.linalg.eigh(t)
    tiny = torch.finfo(t.dtype).tiny
    each = d / 2 * (vectors[:, 0].square() * nodes.clamp(min=tiny).log()).sum(1)
    each = each.view(-1, probes)
    return each.mean(1), each.std(1) / math.sqrt(probes)
