"""The walk back through flow layers that stored nothing: rebuilt states beside their gradients."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mflow_kernels.layers.moves import Couple, Leave, Mix, Mixes, Move, Squeezing
from mflow_kernels.ops._launch import channels_first
from mflow_kernels.ops.unstep import uncouple, unmix


class Network:
    """A coupling network, with what the walk back asks of its modules looked up once."""

    def __init__(self, net: nn.Module) -> None:
        modules = list(net.modules())
        parameters = {id(p): p for m in modules for p in m._parameters.values() if p is not None}
        self.net = net
        self.parameters = [p for p in parameters.values() if p.requires_grad]
        self.norms = [m for m in modules if isinstance(m, _NormBase) and m.training]


class WalkBack:
    """Takes moves back one by one, carrying the state and its gradient in halves.

    A coupling leaves its `a` half alone and a mix needs both, so the halves stay tensors of their
    own in between; `dnet`, the gradient that the last network gave its input, waits to be added to
    the gradient of `a` by the launch that reads it next.

    Args:
        moves: as they were walked.
        mixes: the weights that `Mix` moves name.
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
        mixes: Sequence[Mixes],
        context: Sequence[Tensor],
        kept: dict[int, Tensor],
        networks: Sequence[Network],
        random: Sequence["RandomState | None"],
        autocast: dict[str, Any],
        dlogdet: Tensor,
    ) -> None:
        self.moves, self.mixes, self.kept, self.random = moves, mixes, kept, random
        self.networks, self.autocast, self.dlogdet = networks, autocast, dlogdet
        self.inverses = [torch.linalg.inv_ex(m.weight.double())[0] for m in mixes]
        self.context = [c.detach().requires_grad_(c.requires_grad) for c in context]
        self.context_gradients: list[Tensor | None] = [None] * len(context)
        self.parameter_gradients: dict[int, Tensor] = {}
        self.partials: dict[Mix, tuple[Tensor, Tensor]] = {}
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

    def mix_gradients(self) -> list[Tensor]:
        """d weight and d bias of each of the mixes, in turn."""
        gradients = []
        for group, mix in enumerate(self.mixes):
            rows = [self.partials[Mix(group, row)] for row in range(mix.weight.shape[0])]
            gram = torch.stack([gram for gram, _ in rows]).sum(1)
            dweight = gram.double() @ self.inverses[group].mT
            dbias = torch.stack([dbias for _, dbias in rows]).sum(1)
            gradients += [dweight.to(mix.weight.dtype), dbias]
        return gradients

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
        self.channels_last = x.dim() > 2 and not channels_first(x)
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
            _still_statistics(network.norms),
        ):
            network_input = network_input.detach().requires_grad_()
            params = network.net(network_input, *self.context)
        b, db, dparams = uncouple(
            self.b, self.db, self.dlogdet, params.detach(), move.scale, move.inverse,
            kept is not None,
        )  # fmt: skip
        dnet = self._network_backward(network.parameters, network_input, params, dparams)
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
        for p, g in zip(parameters, gradients[1:], strict=False):
            if g is not None:
                total = self.parameter_gradients.get(id(p))
                self.parameter_gradients[id(p)] = g if total is None else total + g
        for i, g in zip(context, gradients[1 + len(parameters) :], strict=True):
            if g is not None:
                total = self.context_gradients[i]
                self.context_gradients[i] = g if total is None else total + g
        return gradients[0]

    def _unmix(self, move: Mix, feeds: bool, rebuild: bool) -> None:
        mix = self.mixes[move.group]
        inverse = self.inverses[move.group][move.row].to(mix.weight.dtype) if rebuild else None
        x, dx, net, gram, dbias = unmix(
            (self.a, self.b), (self.da, self.db), self.dnet, mix.weight[move.row], inverse,
            mix.bias[move.row], self._network_dtype() if feeds else None, self.channels_last,
        )  # fmt: skip
        self.partials[move] = gram, dbias
        # Where the state before was kept, x is None and dx stands in until it is picked up.
        self._set(dx if x is None else x, dx)
        self.net = net

    def _network_dtype(self) -> torch.dtype:
        return self.autocast["dtype"] if self.autocast["enabled"] else self.db.dtype


def autocast_state(device: torch.device) -> dict[str, Any]:
    """Arguments of a `torch.autocast` like the one that is on, but that caches no cast weight: one
    cast without gradients would serve the walk back too."""
    return {
        "device_type": device.type,
        "dtype": torch.get_autocast_dtype(device.type),
        "enabled": torch.is_autocast_enabled(device.type),
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


@contextmanager
def _still_statistics(norms: Sequence[_NormBase]) -> Iterator[None]:
    """Running statistics were updated the first time; running a network again leaves them."""
    saved = [(m, m.momentum, m.num_batches_tracked) for m in norms]
    for m in norms:
        # Of weight 0, the batch changes no running mean; the count of batches is put back below.
        m.momentum = 0.0
        m.num_batches_tracked = None if m.num_batches_tracked is None else m.num_batches_tracked + 0
    try:
        yield
    finally:
        for m, momentum, tracked in saved:
            m.momentum, m.num_batches_tracked = momentum, tracked
