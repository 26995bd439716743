"""Steps of flow as one instruction, which shares launches between neighbours.

A coupling and the linear map after it are one launch, and the backward pass undoes each with one
launch: K steps need K + 1 launches forward and 2 K backward, plus those of the networks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mflow_kernels.ops import cpu
from mflow_kernels.ops.checks import check_device
from mflow_kernels.ops.conv1x1 import conv1x1_op, spread
from mflow_kernels.ops.launch import is_walked, uses_triton
from mflow_kernels.ops.layouts import cut_net_input
from mflow_kernels.ops.partial_sums import unbind_weights
from mflow_kernels.ops.precision import autocast_dtype
from mflow_kernels.ops.registration import Operator, eager_function
from mflow_kernels.ops.step import StepOptions, step
from mflow_kernels.reversible.couples import PRECISION, AffineCouple, Couple
from mflow_kernels.reversible.instructions import (
    BackwardPass,
    Call,
    FoldedWeights,
    ForwardPass,
    Gradients,
    Instruction,
    Pair,
)
from mflow_kernels.reversible.linear_maps import LinearMap, VectorGradients, WeightGradients
from mflow_kernels.reversible.masks import frames, mask_at


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
        masked: whether the first context is a mask. States and gradients stay zero at padding: each
            launch is followed by a product with the mask, since a bias or spline fills padding.
    """

    computes = True

    def __init__(
        self, steps: Sequence[Step], inverted: bool = False, *, masked: bool = False
    ) -> None:
        self.steps, self.inverted, self.masked = list(steps), inverted, masked
        # The class of the linear maps, which `fused` compares without looking at all steps again.
        self._kind = next((type(s.linear) for s in steps if s.linear is not None), None)

    @property
    def _dense(self) -> bool:
        return next((s.linear.dense for s in self.steps if s.linear is not None), True)

    @property
    def calls(self) -> list[Call]:
        return [s.couple.call(self.masked) for s in self.steps if s.couple is not None]

    def at(self, place: str) -> "Steps":
        self.steps = [step._replace(place=place) for step in self.steps]
        return self

    def fused(self, following: Instruction) -> "Steps | None":
        """Steps that follow share a launch, and all linear maps are folded together."""
        if not isinstance(following, Steps) or self.inverted != following.inverted:
            return None
        if self.masked != following.masked:
            return None
        if self._kind is not following._kind and None not in (self._kind, following._kind):
            return None
        *before, last = self.steps
        first, *after = following.steps
        if last.couple is None and first.linear is None:
            before = [*before, Step(last.linear, first.couple, last.place)]
        else:
            before, after = self.steps, following.steps
        return Steps([*before, *after], self.inverted, masked=self.masked)

    def inverse(self) -> "Steps":
        steps: list[Step] = []
        for linear, couple, place in reversed(self.steps):
            if couple is not None and steps and steps[-1].couple is None:
                steps[-1] = steps[-1]._replace(couple=couple.inverse())
            elif couple is not None:
                steps.append(Step(None, couple.inverse(), place))
            if linear is not None:
                steps.append(Step(linear, None, place))
        return Steps(steps, not self.inverted, masked=self.masked)

    def pixels(self, forward: ForwardPass) -> int | Tensor:
        return frames(forward.context[0], forward.x) if self.masked else super().pixels(forward)

    def fold(self, dtype: torch.dtype, *, check: bool = False) -> FoldedWeights | None:
        """The rows are in the direction data -> latent."""
        found = [(s.linear, s.place) for s in self.steps if s.linear is not None]
        if not found:
            return None
        maps, places = zip(*(found[::-1] if self.inverted else found), strict=True)
        how = {"inverted": self.inverted, "check": check}
        return type(maps[0]).fold(maps, places, dtype, **how)

    def loops(self, x: Tensor) -> bool:
        if self.masked or uses_triton(x) or not cpu.serves(x) or is_walked():
            return False
        return all(step.linear is None or step.linear.loops() for step in self.steps)

    def run(self, forward: ForwardPass, folded: FoldedWeights | None) -> None:
        if folded is None and self.loops(forward.x):
            self._run_loops(forward)
        else:
            self._run_folded(forward, folded)

    def _run_loops(self, forward: ForwardPass) -> None:
        """Run by `ops.step`, one node of autograd's graph for a coupling and the map after it."""
        x, logdet = forward.x, None
        applied = False  # whether the coupling before has applied this step's linear map
        net_input: Tensor | None = None
        for i, (linear, couple, place) in enumerate(self.steps):
            if linear is not None and not applied:
                dtype = None if couple is None else autocast_dtype(x)
                options = StepOptions(inverse_linear=self.inverted, net_dtype=dtype)
                x, net_input, logdet = step(options, x, None, logdet, *linear.named_factors(place))
            applied = False
            if couple is None:
                continue
            net_input = _cut(x) if net_input is None else net_input
            params = couple.checked(x, forward.call(couple.call(False), x, net_input))
            net_input = None
            if not isinstance(couple, AffineCouple):
                x, ledger = couple.run(x, params)
                forward.ledger.append(ledger)
                continue
            following = self.steps[i + 1] if i + 1 < len(self.steps) else Step(None, None)
            dtype = None if following.couple is None else autocast_dtype(x)
            options = StepOptions(couple.scale, couple.inverted, self.inverted, dtype)
            if following.linear is None:
                x, _, logdet = step(options._replace(net_dtype=None), x, params, logdet)
                continue
            factors = following.linear.named_factors(following.place)
            x, net_input, logdet = step(options, x, params, logdet, *factors)
            applied = True
        if logdet is not None:
            forward.ledger.append(logdet)
        forward.x = x

    def _run_folded(self, forward: ForwardPass, folded: FoldedWeights | None) -> None:
        x, steps, dense = forward.x, self.steps, self._dense
        valid = mask_at(forward.context[0], x) if self.masked else None
        weights = iter(_rows(folded, self.inverted, x, dense))
        net_input: Tensor | None = None
        for i, one in enumerate(steps):
            before = steps[i - 1].couple if i else None
            # A launch that fuses both has applied the linear map, and cut the network's input.
            fused = dense and before is not None and before.fuses
            if one.linear is not None and not fused:
                dtype = None if one.couple is None else autocast_dtype(x)
                if dense:
                    x, net_input = conv1x1_op(x, *next(weights), PRECISION, dtype)
                else:
                    x, net_input = one.linear.run(x, *next(weights), self.inverted, dtype)
                x, net_input = _valid(x, valid), _valid(net_input, valid)
            if one.couple is None:
                continue
            if net_input is None:
                net_input = _cut(x)
            couple, call = one.couple, one.couple.call(self.masked)
            params = couple.checked(x, forward.call(call, x, net_input))
            following = steps[i + 1] if i + 1 < len(steps) else None
            if dense and couple.fuses and following is not None and following.linear is not None:
                dtype = None if following.couple is None else autocast_dtype(x)
                x, net_input, ledger = couple.run_with_linear(x, params, next(weights), dtype)
            else:
                (x, ledger), net_input = couple.run(x, params), None
            x, net_input = _valid(x, valid), _valid(net_input, valid)
            forward.ledger.append(ledger)
        forward.x = x

    def undo(self, backward: BackwardPass, folded: Pair | None) -> Gradients | None:
        (a, b), (da, db) = backward.halves()
        valid = mask_at(backward.context[0], b) if self.masked else None
        da, db = _valid(da, valid), _valid(db, valid)
        gradients = WeightGradients if self._dense else VectorGradients
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
                whole, b, db = None, _valid(b, valid), _valid(db, valid)
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
                if valid is not None:  # in place, because `whole` may have the memory of a and b
                    for part in (a, b) if net_input is None else (a, b, net_input):
                        part.mul_(valid)
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


def _valid(x: Any, valid: Tensor | None) -> Any:
    """x with zeros where `valid` is 0; x itself without a mask, and if it is None or empty."""
    if x is None or valid is None or not x.numel():
        return x
    return x * valid.to(x.dtype)


def _cut(x: Tensor) -> Tensor:
    """The input of the next network. For a small vector the time on the host counts, and torch's
    own operators take the least."""
    dtype = autocast_dtype(x)
    if x.dim() == 2 and dtype == x.dtype:
        return x[:, : x.shape[1] // 2].clone(memory_format=torch.contiguous_format)
    return _cut_op(x, dtype)


# Autograd's own gradient of a slice is a contiguous state that is zero outside the slice. This
# function keeps the layout of the state.


def _setup_cut(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
    ctx.like = torch.empty_like(inputs[0], device="meta")


def _cut_backward(ctx: Any, dnet: Tensor) -> tuple[Tensor | None, ...]:
    dx = torch.zeros_like(ctx.like, device=dnet.device)
    dx[:, : dnet.shape[1]] = dnet
    return dx, None


_cut_op = Operator(
    cut_net_input, eager_function(cut_net_input, _setup_cut, _cut_backward), cut_net_input
)


def _rows(
    folded: FoldedWeights | None, inverted: bool, x: Tensor, dense: bool
) -> list[tuple[Tensor, Tensor]]:
    """The weight and bias of each step, in the order in which the steps run."""
    if folded is None:
        return []
    check_device("weight", folded.weight, x)
    # `unbind` makes one gradient of all steps; indexing would make and add one for each.
    if dense and len(folded.weight) == 1 and not uses_triton(x):
        return [(folded.weight, folded.bias)]  # one step, and one partial sum of its gradient
    if dense:
        weight, bias = spread(folded.weight, folded.bias, x)
        rows = list(zip(unbind_weights(weight), bias.unbind(), strict=True))
    else:
        rows = list(zip(folded.weight.unbind(), folded.bias.unbind(), strict=True))
    return rows[::-1] if inverted else rows
