"""The walk back through flow layers that stored nothing: rebuilt states beside their gradients."""

from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mflow_kernels.layers.moves import Couple, Leave, Mix, Mixes, Move, Squeezing
from mflow_kernels.ops._launch import accumulator, autocasts, is_channels_last, without_autocast
from mflow_kernels.ops.uncouple import uncouple
from mflow_kernels.ops.unmix import unmix


class Folds(Protocol):
    """Steps of one width whose 1x1 convolutions fold into `Mixes`."""

    @property
    def steps(self) -> Sized: ...
    def mixes(self, dtype: torch.dtype) -> Mixes: ...
    def parameters(self) -> list[nn.Parameter]:
        """Those that `mixes` depends on and that have gradients."""


class Network:
    """A coupling network, with what the walk back asks of its modules looked up once."""

    def __init__(self, net: nn.Module) -> None:
        modules = [net]
        for module in modules:  # as `net.modules()` finds them, in a third of the time
            modules += [m for m in module._modules.values() if m is not None]
        self.net = net
        self.found = [(m._parameters, k, p) for m in modules for k, p in m._parameters.items()]
        parameters = {id(p): p for *_, p in self.found if p is not None}
        self.trained = [p for p in parameters.values() if p.requires_grad]
        self.modes = [(m, m.training) for m in modules]
        self.norms = [m for m in modules if isinstance(m, _NormBase) and m.training]

    @contextmanager
    def again(self) -> Iterator[None]:
        """While it runs again: in the modes (train, eval) of the first time, whose update of the
        running statistics was the only one.

        Raises:
            RuntimeError: where a parameter is no longer the tensor that it was.
        """
        if any(place.get(name) is not p for place, name, p in self.found):
            raise_exchanged()
        switched = [(m, mode) for m, mode in self.modes if m.training is not mode]
        saved = [(m, m.momentum, m.num_batches_tracked) for m in self.norms]
        for module, mode in switched:
            module.training = mode
        for m in self.norms:
            # Of weight 0, the batch changes no running mean; the count of batches is put back.
            m.momentum = 0.0
            count = m.num_batches_tracked
            m.num_batches_tracked = None if count is None else count + 0
        try:
            yield
        finally:
            for m, momentum, tracked in saved:
                m.momentum, m.num_batches_tracked = momentum, tracked
            for module, mode in switched:
                module.training = not mode


def raise_exchanged() -> NoReturn:
    raise RuntimeError(
        "ReversibleChain: since the forward pass a parameter was unfrozen, or exchanged for "
        "another tensor, as by torch.func.functional_call; reversible=False allows that"
    )


class WalkBack:
    """Takes moves back one by one, carrying the state and its gradient in halves.

    A coupling leaves its `a` half alone and a mix needs both, so the halves stay tensors of their
    own in between; `dnet`, the gradient that the last network gave its input, waits to be added to
    the gradient of `a` by the launch that reads it next.

    Args:
        moves: as they were walked.
        groups: the steps whose weights `Mix` moves name; folded again, one group at a time.
        dlog_dets: the gradient of each group's log_det.
        context: further inputs of every network.
        kept: states before the networks of these ordinals, which need not be rebuilt.
        networks: in the order in which they ran.
        random: for each network, the random state it started from if it drew.
        autocast: arguments of the autocast that was on.
        dlogdet: (N,), gradient of each sample's log-determinant.
    """

    dnet: Tensor | None
    net: Tensor | None
    _whole: tuple[Tensor, Tensor] | None

    def __init__(
        self,
        moves: Sequence[Move],
        groups: Sequence[Folds],
        dlog_dets: Sequence[Tensor],
        context: Sequence[Tensor],
        kept: dict[int, Tensor],
        networks: Sequence[Network],
        random: Sequence["RandomState | None"],
        autocast: dict[str, Any],
        dlogdet: Tensor,
    ) -> None:
        self.moves, self.groups, self.dlog_dets = moves, groups, dlog_dets
        self.kept, self.random = kept, random
        self.networks, self.autocast, self.dlogdet = networks, autocast, dlogdet
        self.context = [c.detach().requires_grad_(c.requires_grad) for c in context]
        self.context_gradients: list[Tensor | None] = [None] * len(context)
        self.parameter_gradients: dict[int, Tensor] = {}
        self.entered: _Entered | None = None
        self.dlatents: list[Tensor] = []

    def walk(
        self, x: Tensor, dx: Tensor, latents: Sequence[Tensor], dlatents: Sequence[Tensor]
    ) -> None:
        """From the end of the walk, where the state was x, back to its start; then `x` and `dx` are
        those of the start and `dlatents` the gradients of latents that came in, first one first."""
        self._set(x, dx)
        ordinal = len(self.random)
        left = list(zip(latents, dlatents, strict=True))
        for i in reversed(range(len(self.moves))):
            move = self.moves[i]
            if isinstance(move, Couple):
                ordinal -= 1
                self._uncouple(move, ordinal)
            elif isinstance(move, Mix):
                before = self.moves[i - 1] if i else None
                feeds = isinstance(before, Couple)
                self._unmix(move, feeds, rebuild=not (feeds and ordinal - 1 in self.kept))
            elif isinstance(move, Squeezing):
                back = Squeezing(not move.inverse)
                self._set(back(self.x), back(self.dx))
            elif isinstance(move, Leave):
                latent, dlatent = left.pop()
                self._set_halves(self.x, latent, self.dx, dlatent)
            else:
                self.dlatents.append(self.db)
                self._set(self.a, self._add_dnet())

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

    def _uncouple(self, move: Couple, ordinal: int) -> None:
        kept = self.kept.get(ordinal)
        if kept is not None:
            c_a = kept.shape[1] // 2
            self.a, self.b, self.net = kept[:, :c_a], kept[:, c_a:], None
        network_input = self.net
        if network_input is None:
            network_input = torch.empty_like(self.a, dtype=self._network_dtype()).copy_(self.a)
        network = self.networks[ordinal]
        with (
            torch.enable_grad(),
            torch.autocast(**self.autocast),
            _random_state_of(self.random[ordinal]),
            network.again(),
        ):
            network_input = network_input.detach().requires_grad_()
            params = network.net(network_input, *self.context)
        b, db, dparams = uncouple(
            self.b, self.db, self.dlogdet, params.detach(), move.scale, move.inverse,
            kept is not None,
        )  # fmt: skip
        dnet = self._network_backward(network.trained, network_input, params, dparams)
        self._set_halves(self.a, b, self._add_dnet(), db)
        self.dnet = dnet

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

    def _unmix(self, move: Mix, feeds: bool, rebuild: bool) -> None:
        if self.entered is None:
            self.entered = _Entered(
                self.groups[move.group],
                self.dlog_dets[move.group],
                accumulator(self.db.dtype),
            )
        weight, bias, inverse = self.entered.row(move.row)
        x, dx, net, gram, dbias = unmix(
            (self.a, self.b), (self.da, self.db), self.dnet, weight, inverse if rebuild else None,
            bias, self._network_dtype() if feeds else None, self.channels_last,
        )  # fmt: skip
        self.entered.gather(move.row, gram, dbias)
        if not self.entered.left:
            self._add_gradients(*self.entered.leave())
            self.entered = None
        # Where the state before was kept, x is None and dx stands in until it is picked up.
        self._set(dx if x is None else x, dx)
        self.net = net

    def _network_dtype(self) -> torch.dtype:
        return self.autocast["dtype"] if self.autocast["enabled"] else self.db.dtype


PARTIALS_BYTES = 2**26  # of partial sums of gram to keep before they are added up


class _Entered:
    """A group of steps on the walk back: its folded weights, and the gradients they gather."""

    def __init__(self, group: Folds, dlog_det: Tensor, dtype: torch.dtype) -> None:
        self.group, self.dlog_det = group, dlog_det
        with torch.enable_grad():
            self.mixes = group.mixes(dtype)
        self.inverse = torch.linalg.inv_ex(self.mixes.weight.detach().double())[0]
        self.rounded_inverse = self.inverse.to(self.mixes.weight.dtype)
        self.left = len(group.steps)
        self.partials: list[tuple[int, Tensor, Tensor]] = []
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}

    def row(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """weight, bias and the inverse weight of a step."""
        weight, bias = (t.detach()[row] for t in self.mixes[:2])
        return weight, bias, self.rounded_inverse[row]

    def gather(self, row: int, gram: Tensor, dbias: Tensor) -> None:
        """Take a step's partial sums of gram and d bias; many steps' are added in one launch."""
        self.left -= 1
        self.partials.append((row, gram, dbias))
        if len(self.partials) * gram.nbytes > PARTIALS_BYTES:
            self._add_up()

    def _add_up(self) -> None:
        if self.partials:
            rows, grams, dbiases = zip(*self.partials, strict=True)
            sums = torch.stack(grams).sum(1), torch.stack(dbiases).sum(1)
            self.sums.update({row: (sums[0][i], sums[1][i]) for i, row in enumerate(rows)})
            self.partials.clear()

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


def autocast_state(device: torch.device) -> dict[str, Any]:
    """Arguments of a `torch.autocast` like the one that is on, but that caches no cast weight: one
    cast without gradients would serve the walk back too."""
    kind = "cpu" if device.type == "meta" else device.type  # torch.autocast knows no meta device
    return {
        "device_type": kind,
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": autocasts(device),
        "cache_enabled": False,
    }


# The CPU generator's state; seed and offset of the device's.
RandomState = tuple[Tensor, tuple[int, int] | None]


def random_state(device: torch.device) -> RandomState:
    """The state of the default generators that a network on `device` may draw from."""
    cuda = None
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        generator = torch.cuda.default_generators[device.index or 0]
        cuda = generator.initial_seed(), generator.get_offset()
    return torch.get_rng_state(), cuda


def same_random_state(a: RandomState, b: RandomState) -> bool:
    return a[1] == b[1] and torch.equal(a[0], b[0])


@contextmanager
def _random_state_of(state: RandomState | None) -> Iterator[None]:
    """Draw the numbers that were drawn from `state`, and leave the generators as they were."""
    if state is None:
        yield
        return
    devices = [] if state[1] is None else [torch.cuda.current_device()]
    with torch.random.fork_rng(devices):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            generator = torch.cuda.default_generators[devices[0]]
            generator.manual_seed(state[1][0])
            generator.set_offset(state[1][1])
        yield
