"""Steps of flow as one instruction, which shares launches between neighbours.

A coupling and the linear map after it are one launch, and the backward pass undoes each with one
launch: K steps need K + 1 launches forward and 2 K backward, plus those of the networks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mflow_kernels.ops.checks import check_device
from mflow_kernels.ops.conv1x1 import conv1x1_eager, conv1x1_forward, conv1x1_op, invert, spread
from mflow_kernels.ops.coupling import (
    affine_coupling_op,
    check_params,
    coupling_eager,
    coupling_forward,
)
from mflow_kernels.ops.coupling_conv1x1 import (
    coupling_conv1x1_eager,
    coupling_conv1x1_forward,
    coupling_conv1x1_op,
)
from mflow_kernels.ops.launch import transformed
from mflow_kernels.ops.layouts import cut_net_input, pixels
from mflow_kernels.ops.partial_sums import unbind_weights
from mflow_kernels.ops.precision import autocast_dtype, without_autocast
from mflow_kernels.ops.rational_quadratic import (
    check_numbers,
    rational_quadratic_op,
    spline_backward,
    spline_eager,
    spline_forward,
)
from mflow_kernels.ops.rebuild_conv1x1 import (
    Halves,
    RebuiltConv1x1,
    rebuild_conv1x1,
    rebuild_splits,
)
from mflow_kernels.ops.rebuild_coupling import RebuiltCoupling, rebuild_coupling
from mflow_kernels.ops.registration import eager_function
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.ops.spline import Spline
from mflow_kernels.reversible.instructions import (
    BackwardPass,
    Call,
    FoldedWeights,
    ForwardPass,
    Gradients,
    Instruction,
    Pair,
)

PRECISION = "tf32x3"
Map = TypeVar("Map", bound="LinearMap")


class LinearMap:
    """x -> W x + bias at each pixel, in the direction data -> latent.

    Attributes:
        dense: whether `fold` gives matrices (K, C, C), which the launches multiply with the state.
            If not, it gives vectors (K, C), and `run` and `undo` apply them.
    """

    dense = True

    @classmethod
    def fold(
        cls: type[Map],
        maps: Sequence[Map],
        places: Sequence[str],
        dtype: torch.dtype,
        *,
        inverted: bool,
        check: bool,
        lean: bool,
    ) -> FoldedWeights:
        """Compute the weights of maps of one width, or of their inverses, in one batch.

        Args:
            places: the layers that they came from, for errors.
            lean: as for `Instruction.fold`.

        Raises:
            ValueError: with `check`, if an inverse is needed and does not exist.
        """
        raise NotImplementedError

    def run(
        self, x: Tensor, weight: Tensor, bias: Tensor, inverted: bool, net_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None]:
        """The next state, and the network input of this dtype cut from it. Only if not `dense`.

        Args:
            weight, bias: (C,), from `fold`.
        """
        raise NotImplementedError

    def undo(
        self, y: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, inverted: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The state before `run`, its gradient, and those of weight and bias if they are needed."""
        raise NotImplementedError


class Couple:
    """A coupling, or its inverse: the first half of the channels (rounded down) stays, and the
    network's output for it, params, says how the second half changes.

    Attributes:
        fuses: whether one launch does the coupling and a linear map after it.
    """

    fuses = False

    def __init__(self, net: nn.Module, inverted: bool) -> None:
        self.net, self.inverted = net, inverted

    def checked(self, x: Tensor, params: object) -> Tensor:
        """The params for the state x; raise TypeError or ValueError if they do not fit it."""
        raise NotImplementedError

    def run(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The next state, and its ledger (N, T)."""
        raise NotImplementedError

    def run_with_linear(
        self, x: Tensor, params: Tensor, weights: Pair, net_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state after the linear map that follows, the input of the next network, cut from it
        in this dtype, and the ledger. Only if it `fuses`."""
        raise NotImplementedError

    def undo(
        self, z_b: Tensor, dz_b: Tensor, dlogdet: Tensor, params: Tensor, true_b: Tensor | None
    ) -> RebuiltCoupling:
        """Rebuild the second half of the state before the coupling, and compute its gradient and
        that of params. If that half was stored, it is `true_b`, and they are the gradients there.
        """
        raise NotImplementedError

    def inverse(self) -> "Couple":
        raise NotImplementedError


class AffineCouple(Couple):
    """The affine coupling with this network, or its inverse."""

    fuses = True

    def __init__(self, net: nn.Module, scale: ScaleFunction, inverted: bool = False) -> None:
        super().__init__(net, inverted)
        self.scale = scale

    def checked(self, x: Tensor, params: object) -> Tensor:
        return check_params(x, params, "net's output")

    def run(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        run = _operator(affine_coupling_op, coupling_eager, coupling_forward)
        return run(x, params, *self.scale.args, self.inverted)

    def run_with_linear(
        self, x: Tensor, params: Tensor, weights: Pair, net_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = _operator(coupling_conv1x1_op, coupling_conv1x1_eager, coupling_conv1x1_forward)
        return run(x, params, *weights, PRECISION, net_dtype, *self.scale.args, self.inverted)

    def undo(
        self, z_b: Tensor, dz_b: Tensor, dlogdet: Tensor, params: Tensor, true_b: Tensor | None
    ) -> RebuiltCoupling:
        return rebuild_coupling(z_b, dz_b, dlogdet, params, self.scale, self.inverted, true_b)

    def inverse(self) -> "AffineCouple":
        return AffineCouple(self.net, self.scale, not self.inverted)


class SplineCouple(Couple):
    """The coupling by splines with this network, or its inverse."""

    def __init__(self, net: nn.Module, spline: Spline, inverted: bool = False) -> None:
        super().__init__(net, inverted)
        self.spline = spline

    def checked(self, x: Tensor, params: object) -> Tensor:
        return check_numbers(x, params, self.spline, x.shape[1] // 2, "net's output")

    def run(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        run = _operator(rational_quadratic_op, spline_eager, spline_forward)
        return run(x, params, *self.spline.args, x.shape[1] // 2, self.inverted)

    def undo(
        self, z_b: Tensor, dz_b: Tensor, dlogdet: Tensor, params: Tensor, true_b: Tensor | None
    ) -> RebuiltCoupling:
        how = self.spline.args
        y_b, _ = spline_forward(z_b, params, *how, 0, not self.inverted)
        at_b = y_b if true_b is None else true_b
        dledger = dlogdet[:, None].expand(-1, pixels(z_b))
        dy_b, dparams = spline_backward(dz_b, dledger, at_b, params, *how, 0, self.inverted)
        return RebuiltCoupling(y_b, dy_b, dparams)

    def inverse(self) -> "SplineCouple":
        return SplineCouple(self.net, self.spline, not self.inverted)


class Step(NamedTuple):
    """A linear map, and a coupling after it. One of them may be missing."""

    linear: LinearMap | None
    couple: Couple | None
    place: str = ""  # the layer that it came from


class Steps(Instruction):
    """Steps of flow of one width, or their inverses.

    Args:
        steps: in the order in which they run.
        inverted: whether each linear map runs as its inverse.
    """

    computes = True

    def __init__(self, steps: Sequence[Step], inverted: bool = False) -> None:
        self.steps, self.inverted = list(steps), inverted
        # The class of the linear maps, which `fused` compares without looking at all steps again.
        self._kind = next((type(s.linear) for s in steps if s.linear is not None), None)

    @property
    def _dense(self) -> bool:
        return next((s.linear.dense for s in self.steps if s.linear is not None), True)

    @property
    def calls(self) -> list[Call]:
        return [Call(s.couple.net, s.couple.net) for s in self.steps if s.couple is not None]

    def at(self, place: str) -> "Steps":
        self.steps = [step._replace(place=place) for step in self.steps]
        return self

    def fused(self, following: Instruction) -> "Steps | None":
        """Steps that follow share a launch, and all linear maps are folded together."""
        if not isinstance(following, Steps) or self.inverted != following.inverted:
            return None
        if self._kind is not following._kind and None not in (self._kind, following._kind):
            return None
        *before, last = self.steps
        first, *after = following.steps
        if last.couple is None and first.linear is None:
            return Steps([*before, Step(last.linear, first.couple, last.place), *after])
        return Steps([*self.steps, *following.steps])

    def inverse(self) -> "Steps":
        steps: list[Step] = []
        for linear, couple, place in reversed(self.steps):
            if couple is not None and steps and steps[-1].couple is None:
                steps[-1] = steps[-1]._replace(couple=couple.inverse())
            elif couple is not None:
                steps.append(Step(None, couple.inverse(), place))
            if linear is not None:
                steps.append(Step(linear, None, place))
        return Steps(steps, not self.inverted)

    def fold(
        self, dtype: torch.dtype, *, check: bool = False, lean: bool = False
    ) -> FoldedWeights | None:
        """The rows are in the direction data -> latent."""
        found = [(s.linear, s.place) for s in self.steps if s.linear is not None]
        if not found:
            return None
        maps, places = zip(*(found[::-1] if self.inverted else found), strict=True)
        how = {"inverted": self.inverted, "check": check, "lean": lean}
        return type(maps[0]).fold(maps, places, dtype, **how)

    def run(self, forward: ForwardPass, folded: FoldedWeights | None) -> None:
        linear = _operator(conv1x1_op, conv1x1_eager, conv1x1_forward)
        x, steps, dense = forward.x, self.steps, self._dense
        weights = iter(_rows(folded, self.inverted, x, dense))
        net_input: Tensor | None = None
        for i, step in enumerate(steps):
            before = steps[i - 1].couple if i else None
            # A launch that fuses both has applied the linear map, and cut the network's input.
            fused = dense and before is not None and before.fuses
            if step.linear is not None and not fused:
                dtype = None if step.couple is None else autocast_dtype(x)
                if dense:
                    x, net_input = linear(x, *next(weights), PRECISION, dtype)
                else:
                    x, net_input = step.linear.run(x, *next(weights), self.inverted, dtype)
            if step.couple is None:
                continue
            if net_input is None:
                net_input = _cut(x)
            couple, call = step.couple, Call(step.couple.net, step.couple.net)
            params = couple.checked(x, forward.call(call, x, net_input))
            following = steps[i + 1] if i + 1 < len(steps) else None
            if dense and couple.fuses and following is not None and following.linear is not None:
                dtype = None if following.couple is None else autocast_dtype(x)
                x, net_input, ledger = couple.run_with_linear(x, params, next(weights), dtype)
            else:
                (x, ledger), net_input = couple.run(x, params), None
            forward.ledger.append(ledger)
        forward.x = x

    def undo(self, backward: BackwardPass, folded: Pair | None) -> Gradients | None:
        (a, b), (da, db) = backward.halves()
        gradients = _WeightGradients if self._dense else _VectorGradients
        weights = None if folded is None else gradients(*folded, self.inverted, backward)
        net_input: Tensor | None = None  # of the coupling to be undone, if a launch has cut it
        dnet: Tensor | None = None  # gradient of a through the network that read it
        whole: tuple[Tensor, Tensor] | None = None
        for i in reversed(range(len(self.steps))):
            linear, couple, _ = self.steps[i]
            if couple is not None:
                again, stored = backward.next_call()
                if stored is not None:
                    net_input = stored[1]
                elif net_input is None:
                    net_input = torch.empty_like(a, dtype=backward.network_dtype(a)).copy_(a)
                da = da if dnet is None else da + dnet
                true = None if stored is None else stored[0].tensor_split([a.shape[1]], dim=1)
                true_b = None if true is None else true[1]
                b, db, dnet = _undo_couple(couple, backward, again, net_input, b, db, true_b)
                whole = None
                if stored is not None and true is not None:
                    backward.compare((a, b), stored[0])
                    a, b = true
            if linear is not None:
                assert weights is not None
                # A coupling reads the two halves next, and every other instruction one tensor.
                couple_next = i > 0 and self.steps[i - 1].couple is not None
                made = weights.undo_linear(linear, (a, b), (da, db), dnet, couple_next)
                (a, b), (da, db) = made.x, made.dx
                whole, net_input, dnet = made.whole, made.net, None
        if whole is not None:
            backward.set(*whole)
        else:
            backward.set_halves((a, b), (da if dnet is None else da + dnet, db))
        return None if weights is None else weights.gradients()


def _undo_couple(
    couple: Couple,
    backward: BackwardPass,
    again: Any,
    net_input: Tensor,
    z_b: Tensor,
    dz_b: Tensor,
    true_b: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The second half of the state before a coupling, its gradient, and the gradient that the
    network returned for its input. `true_b` is that half, if it was stored."""
    net_input = net_input.detach().requires_grad_()
    with torch.enable_grad(), torch.autocast(**backward.autocast):
        params = again.run_again(net_input, backward.context)
    b, db, dparams = couple.undo(z_b, dz_b, backward.dlogdet, params.detach(), true_b)
    return b, db, backward.differentiate(again, (params,), (dparams,), net_input)


def _operator(registered: Any, eager: Any, plain: Any) -> Any:
    """The form of an operator that fits the mode.

    Compilers get the registered operator, autograd gets an autograd function, and everything else
    gets the plain function, which has the least overhead.
    """
    if torch.compiler.is_compiling() and not transformed():
        return registered
    return eager if torch.is_grad_enabled() and not transformed() else plain


def _cut(x: Tensor) -> Tensor:
    """The input of the next network. For a small vector the time on the host counts, and torch's
    own operators take the least."""
    dtype = autocast_dtype(x)
    if x.dim() == 2 and dtype == x.dtype:
        return x[:, : x.shape[1] // 2].clone(memory_format=torch.contiguous_format)
    return _operator(cut_net_input, _cut_eager, cut_net_input)(x, dtype)


# Autograd's own gradient of a slice is a contiguous state that is zero outside the slice. This
# function keeps the layout of the state.


def _setup_cut(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
    ctx.like = torch.empty_like(inputs[0], device="meta")


def _cut_backward(ctx: Any, dnet: Tensor) -> tuple[Tensor | None, ...]:
    dx = torch.zeros_like(ctx.like, device=dnet.device)
    dx[:, : dnet.shape[1]] = dnet
    return dx, None


_cut_eager = eager_function(cut_net_input, _setup_cut, _cut_backward)


def _rows(
    folded: FoldedWeights | None, inverted: bool, x: Tensor, dense: bool
) -> list[tuple[Tensor, Tensor]]:
    """The weight and bias of each step, in the order in which the steps run."""
    if folded is None:
        return []
    check_device("weight", folded.weight, x)
    # `unbind` makes one gradient of all steps; indexing would make and add one for each.
    if dense:
        weight, bias = spread(folded.weight, folded.bias, x)
        rows = list(zip(unbind_weights(weight), bias.unbind(), strict=True))
    else:
        rows = list(zip(folded.weight.unbind(), folded.bias.unbind(), strict=True))
    return rows[::-1] if inverted else rows


PARTIALS_BYTES = 2**26  # most bytes of partial outer sums that wait for one reduction


class _WeightGradients:
    """Undoes the linear maps of some steps, and computes the gradients of their weights.

    The launches store partial sums, from which dW = outer_sum W^-T and d bias follow for all steps
    at once.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, inverted: bool, backward: BackwardPass
    ) -> None:
        self.weight, self.bias, self.backward = weight, bias, backward
        self.inverse = invert(self.weight.double())[0]
        # LAPACK and cuSOLVER return contiguous columns, and the kernels read rows.
        self.rounded_inverse = self.inverse.to(self.weight.dtype).contiguous()
        rows = range(len(self.weight))
        self.remaining = list(reversed(rows) if inverted else rows)  # undone from the last one
        self.partials: tuple[Tensor, Tensor] | None = None
        self.waiting: list[int] = []  # the steps whose partial sums are in `partials`
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}

    def undo_linear(
        self, linear: LinearMap, y: Halves, dy: Halves, dnet: Tensor | None, couple_next: bool
    ) -> RebuiltConv1x1:
        """Undo the last linear map that is not undone; see `rebuild_conv1x1`."""
        splits = rebuild_splits(y[1], self.weight.shape[-1])
        outer_sum, dbias = self._partial_sums(splits)
        row = self.waiting[-1]
        dtype = self.backward.network_dtype(y[1]) if couple_next else None
        return rebuild_conv1x1(
            y,
            dy,
            dnet,
            self.weight[row],
            self.rounded_inverse[row],
            self.bias[row],
            dtype,
            self.backward.channels_last,
            couple_next,
            outer_sum,
            dbias,
        )

    def _partial_sums(self, splits: int) -> tuple[Tensor, Tensor]:
        """Buffers for a step's partial outer sums (splits, C, C) and d bias (splits, C).

        The steps share one buffer of at most `PARTIALS_BYTES`, which one launch reduces.
        """
        if self.partials is not None and len(self.waiting) == len(self.partials[0]):
            self._reduce()
        if self.partials is None:
            c = self.weight.shape[-1]
            fit = PARTIALS_BYTES // (splits * c * c * self.weight.element_size())
            steps = max(1, min(len(self.remaining), fit))
            self.partials = (
                self.weight.new_empty((steps, splits, c, c)),
                self.weight.new_empty((steps, splits, c)),
            )
        self.waiting.append(self.remaining.pop())
        at = len(self.waiting) - 1
        return self.partials[0][at], self.partials[1][at]

    def _reduce(self) -> None:
        if self.partials is not None:
            outer_sums, dbiases = (part[: len(self.waiting)].sum(1) for part in self.partials)
            self.sums.update({r: (outer_sums[i], dbiases[i]) for i, r in enumerate(self.waiting)})
            self.partials, self.waiting = None, []

    def gradients(self) -> Gradients:
        """d weight (K, C, C) and d bias (K, C)."""
        self._reduce()
        if not (self.weight.requires_grad or self.bias.requires_grad):
            return None, None
        sums = [self.sums[row] for row in range(len(self.weight))]
        outer_sum, dbias = (torch.stack(part) for part in zip(*sums, strict=True))
        with without_autocast(outer_sum):
            return (outer_sum.double() @ self.inverse.mT).to(outer_sum.dtype), dbias


class _VectorGradients:
    """As `_WeightGradients`, for linear maps that are not dense."""

    def __init__(
        self, weight: Tensor, bias: Tensor, inverted: bool, backward: BackwardPass
    ) -> None:
        self.weight, self.bias, self.inverted, self.backward = weight, bias, inverted, backward
        rows = range(len(weight))
        self.remaining = list(reversed(rows) if inverted else rows)  # undone from the last one
        self.found: dict[int, tuple[Tensor | None, Tensor | None]] = {}

    def undo_linear(
        self, linear: LinearMap, y: Halves, dy: Halves, dnet: Tensor | None, couple_next: bool
    ) -> RebuiltConv1x1:
        row = self.remaining.pop()
        da = dy[0] if dnet is None else dy[0] + dnet
        whole = torch.cat([*y], dim=1), torch.cat([da, dy[1]], dim=1)
        needed = self.weight.requires_grad or self.bias.requires_grad
        weight, bias = (t[row].detach().requires_grad_(needed) for t in (self.weight, self.bias))
        x, dx, *gradients = linear.undo(*whole, weight, bias, self.inverted)
        self.found[row] = gradients[0], gradients[1]
        c_a = y[0].shape[1]
        x_halves, dx_halves = ((t[:, :c_a], t[:, c_a:]) for t in (x, dx))
        return RebuiltConv1x1(x_halves, dx_halves, (x, dx), None, x[:0], x[:0])

    def gradients(self) -> Gradients:
        """d weight (K, C) and d bias (K, C)."""
        if not (self.weight.requires_grad or self.bias.requires_grad):
            return None, None
        rows = [self.found[row] for row in range(len(self.weight))]
        dweight, dbias = (torch.stack(part) for part in zip(*rows, strict=True))
        return dweight, dbias
