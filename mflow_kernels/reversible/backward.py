"""The walk back through flow layers that stored nothing: rebuilt states beside their gradients."""

from collections.abc import Mapping, Sequence, Sized
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mflow_kernels.ops.launch import accumulator, is_channels_last, without_autocast
from mflow_kernels.ops.rebuild_conv1x1 import rebuild_conv1x1, rebuild_splits
from mflow_kernels.ops.rebuild_coupling import rebuild_coupling
from mflow_kernels.reversible.program import Couple, Leave, Mix, Mixes, Move, Squeezing
from mflow_kernels.reversible.rerun import (
    Network,
    RandomState,
    check_repeats,
    difference,
    raise_not_repeated,
    random_state_of,
)


class Folds(Protocol):
    """Steps of one width whose 1x1 convolutions fold into `Mixes`."""

    @property
    def steps(self) -> Sized: ...
    def mixes(self, dtype: torch.dtype, *, check: bool = False) -> Mixes: ...
    def parameters(self) -> list[nn.Parameter]:
        """Those that `mixes` depends on and that have gradients."""


class WalkBack:
    """Takes moves back one by one, carrying the state and its gradient in halves.

    A coupling leaves its `a` half alone and a mix needs both, so the halves stay tensors of their
    own in between; `dnet`, the gradient that the last network gave its input, waits to be added to
    the gradient of `a` by the launch that reads it next.

    Args:
        x, dx: the state at the end of the walk and its gradient.
        groups: the steps whose weights `Mix` moves name; folded again, one group at a time.
        context: further inputs of every network.
        networks: in the order in which they ran.
        random: for each network, the random state it started from if it drew.
        prints: for each network, the fingerprints of its first run if this one is to be compared.
        autocast: arguments of the autocast that was on.
    """

    dnet: Tensor | None
    net: Tensor | None
    _whole: tuple[Tensor, Tensor] | None

    def __init__(
        self,
        x: Tensor,
        dx: Tensor,
        groups: Sequence[Folds],
        context: Sequence[Tensor],
        networks: Sequence[Network],
        random: Sequence[RandomState | None],
        prints: Sequence[list[Tensor] | None],
        autocast: dict[str, Any],
    ) -> None:
        self.groups, self.networks, self.random, self.prints = groups, networks, random, prints
        self.autocast = autocast
        self.context = [c.detach().requires_grad_(c.requires_grad) for c in context]
        self.context_gradients: list[Tensor | None] = [None] * len(context)
        self.parameter_gradients: dict[int, Tensor] = {}
        self.entered: _Entered | None = None
        self.kept: dict[int, Tensor] = {}
        self._ordinal = len(networks)  # of the network that ran last among those not taken back
        self._set(x, dx)

    def walk(
        self,
        moves: Sequence[Move],
        latents: Sequence[Tensor],
        dlatents: Sequence[Tensor],
        dlog_dets: Mapping[int, Tensor],
        dlogdet: Tensor,
        kept: dict[int, Tensor],
    ) -> list[Tensor]:
        """Take these moves back, the last one first; then `x` and `dx` are those before them.

        The gradients of parameters and of the context add up over calls.

        Args:
            moves: as they were walked, the last ones not taken back yet.
            latents, dlatents: those that left in these moves, and their gradients.
            dlog_dets: for each group of these moves, the gradient of its log_det.
            dlogdet: (N,), the gradient of each sample's log-determinant.
            kept: states before the networks of these ordinals, which need not be rebuilt.

        Returns:
            The gradients of the latents that came in, the one that came in last first.

        Raises:
            RuntimeError: a network did not repeat its first run.
        """
        # Often one number that autograd expanded: written out here once, not for each network.
        self.dlog_dets, self.dlogdet, self.kept = dlog_dets, dlogdet.contiguous(), kept
        self._differences: list[tuple[int, Network, bool, Tensor]] = []
        left, came = list(zip(latents, dlatents, strict=True)), []
        for i in reversed(range(len(moves))):
            move = moves[i]
            if isinstance(move, Couple):
                self._ordinal -= 1
                self._rebuild_coupling(move, self._ordinal)
            elif isinstance(move, Mix):
                before = moves[i - 1] if i else None
                feeds = isinstance(before, Couple)
                self._rebuild_conv1x1(
                    move, feeds, rebuild=not (feeds and self._ordinal - 1 in self.kept)
                )
            elif isinstance(move, Squeezing):
                back = Squeezing(not move.inverse)
                self._set(back(self.x), back(self.dx))
            elif isinstance(move, Leave):
                latent, dlatent = left.pop()
                self._set_halves(self.x, latent, self.dx, dlatent)
            else:
                came.append(self.db)
                self._set(self.a, self._add_dnet())
        check_repeats(self._differences)
        return came

    @property
    def x(self) -> Tensor:
        """The state, whole."""
        return self._whole[0] if self._whole else torch.cat([self.a, self.b], dim=1)

    @property
    def dx(self) -> Tensor:
        """The gradient of the state, whole."""
        return self._whole[1] if self._whole else torch.cat([self._add_dnet(), self.db], dim=1)

    def _set(self, x: Tensor, dx: Tensor) -> None:
        c_a = x.shape[1] // 2
        self.channels_last = is_channels_last(x)
        self._set_halves(x[:, :c_a], x[:, c_a:], dx[:, :c_a], dx[:, c_a:])
        self._whole = x, dx

    def _set_halves(self, a: Tensor, b: Tensor, da: Tensor, db: Tensor) -> None:
        self.a, self.b, self.da, self.db = a, b, da, db
        self.dnet = self.net = None
        self._whole = None

    def _add_dnet(self) -> Tensor:
        return self.da if self.dnet is None else self.da + self.dnet

    def _rebuild_coupling(self, move: Couple, ordinal: int) -> None:
        kept = self.kept.get(ordinal)
        if kept is not None:
            c_a = kept.shape[1] // 2
            self.a, self.b, self.net = kept[:, :c_a], kept[:, c_a:], None
        network_input = self.net
        if network_input is None:
            network_input = torch.empty_like(self.a, dtype=self._network_dtype()).copy_(self.a)
        network, prints = self.networks[ordinal], self.prints[ordinal]
        with (
            torch.enable_grad(),
            torch.autocast(**self.autocast),
            random_state_of(self.random[ordinal]),
            network.again(),
        ):
            network_input = network_input.detach().requires_grad_()
            if prints is None:
                params = network.net(network_input, *self.context)
            else:
                params = self._run_compared(ordinal, network_input, prints)
        b, db, dparams = rebuild_coupling(
            self.b, self.db, self.dlogdet, params.detach(), move.scale, move.inverse,
            kept is not None,
        )  # fmt: skip
        dnet = self._network_backward(network.trained, network_input, params, dparams)
        self._set_halves(self.a, b, self._add_dnet(), db)
        self.dnet = dnet

    def _run_compared(self, ordinal: int, network_input: Tensor, prints: list[Tensor]) -> Tensor:
        network = self.networks[ordinal]
        before = network.changing()
        params, again = network.fingerprinted(network_input, self.context)
        for place, name, buffer, version in before:
            if place.get(name) is not buffer or buffer._version != version:
                raise_not_repeated(ordinal, network, f"changed its buffer {name} again")
        drew = self.random[ordinal] is not None
        self._differences.append((ordinal, network, drew, difference(prints, again)))
        return params

    def _network_backward(
        self,
        parameters: list[nn.Parameter],
        network_input: Tensor,
        params: Tensor,
        dparams: Tensor,
    ) -> Tensor | None:
        if not params.requires_grad:
            return None
        context = [i for i, c in enumerate(self.context) if c.requires_grad]
        sources = [network_input, *parameters, *(self.context[i] for i in context)]
        gradients = torch.autograd.grad(params, sources, dparams, allow_unused=True)
        self._add_gradients(parameters, gradients[1 : 1 + len(parameters)])
        for i, g in zip(context, gradients[1 + len(parameters) :], strict=True):
            if g is not None:
                total = self.context_gradients[i]
                self.context_gradients[i] = g if total is None else total + g
        return gradients[0]

    def _add_gradients(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]
    ) -> None:
        for p, g in zip(parameters, gradients, strict=True):
            if g is not None:
                total = self.parameter_gradients.get(id(p))
                self.parameter_gradients[id(p)] = g if total is None else total + g

    def _rebuild_conv1x1(self, move: Mix, feeds: bool, rebuild: bool) -> None:
        if self.entered is None:
            self.entered = _Entered(
                self.groups[move.group],
                self.dlog_dets[move.group],
                accumulator(self.db.dtype),
            )
        weight, bias, inverse = self.entered.row(move.row)
        sums = self.entered.room(move.row, rebuild_splits(self.b, len(bias)))
        # The next move reads halves if it is a coupling, and else the whole state.
        made = rebuild_conv1x1(
            (self.a, self.b), (self.da, self.db), self.dnet, weight, inverse if rebuild else None,
            bias, self._network_dtype() if feeds else None, self.channels_last, feeds, *sums,
        )  # fmt: skip
        if not self.entered.left:
            self._add_gradients(*self.entered.leave())
            self.entered = None
        # Where the state before was kept, x is None and dx stands in until it is picked up.
        self._set_halves(*(made.x or made.dx), *made.dx)
        if made.whole is not None:
            x, dx = made.whole
            self._whole = dx if x is None else x, dx
        self.net = made.net

    def _network_dtype(self) -> torch.dtype:
        return self.autocast["dtype"] if self.autocast["enabled"] else self.db.dtype


PARTIALS_BYTES = 2**26  # most bytes of partial sums of gram that wait to be added up


class _Entered:
    """A group of steps on the walk back: its folded weights, and the gradients they gather."""

    def __init__(self, group: Folds, dlog_det: Tensor, dtype: torch.dtype) -> None:
        self.group, self.dlog_det = group, dlog_det
        with torch.enable_grad():
            self.mixes = group.mixes(dtype)
        self.inverse = torch.linalg.inv_ex(self.mixes.weight.detach().double())[0]
        # LAPACK's and cuSOLVER's results have their columns contiguous, and kernels read rows.
        self.rounded_inverse = self.inverse.to(self.mixes.weight.dtype).contiguous()
        self.left = len(group.steps)
        self.partials: tuple[Tensor, Tensor] | None = None
        self.waiting: list[int] = []  # the steps that have partial sums there
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}

    def row(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """weight, bias and the inverse weight of a step."""
        weight, bias = (t.detach()[row] for t in self.mixes[:2])
        return weight, bias, self.rounded_inverse[row]

    def room(self, row: int, splits: int) -> tuple[Tensor, Tensor]:
        """Where a step's partial sums of gram (splits, C, C) and d bias (splits, C) go. Those of
        all steps, or of as many as `PARTIALS_BYTES` holds, are then added in one launch."""
        if self.partials is not None:
            steps, has = self.partials[0].shape[:2]
            if len(self.waiting) == steps or has != splits:
                self._add_up()
        if self.partials is None:
            weight = self.mixes.weight.detach()
            c = weight.shape[-1]
            fit = PARTIALS_BYTES // (splits * c * c * weight.element_size())
            steps = max(1, min(self.left, fit))
            self.partials = (
                weight.new_empty((steps, splits, c, c)),
                weight.new_empty((steps, splits, c)),
            )
        self.left -= 1
        self.waiting.append(row)
        return self.partials[0][len(self.waiting) - 1], self.partials[1][len(self.waiting) - 1]

    def _add_up(self) -> None:
        if self.partials is not None:
            grams, dbiases = (part[: len(self.waiting)].sum(1) for part in self.partials)
            self.sums.update({r: (grams[i], dbiases[i]) for i, r in enumerate(self.waiting)})
            self.partials, self.waiting = None, []

    def leave(self) -> tuple[list[nn.Parameter], tuple[Tensor | None, ...]]:
        """The steps' own parameters and their gradients, by way of dW = gram W^-T and d bias."""
        # Each once: of a step that comes twice, autograd gives every mention the whole gradient.
        parameters = list({id(p): p for p in self.group.parameters()}.values())
        if not parameters:
            return [], ()
        self._add_up()
        rows = [self.sums[row] for row in range(len(self.group.steps))]
        gram, dbias = (torch.stack(part) for part in zip(*rows, strict=True))
        with without_autocast(gram):
            dweight = (gram.double() @ self.inverse.mT).to(gram.dtype)
            gradients = torch.autograd.grad(
                tuple(self.mixes), parameters, (dweight, dbias, self.dlog_det), allow_unused=True
            )
        return parameters, gradients
