"""Running a coupling network a second time, so that it repeats what it did.

A reversible backward pass runs each network again. The network must draw the same random numbers,
run in the same modes and under the same autocast, and update no running statistics a second time.
This module arranges that. A network that keeps any other state, such as a `torch.Generator` of its
own or a counter, would silently get wrong gradients. So the first backward pass of every network
compares fingerprints of both runs, and refuses a network that does not repeat itself.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mflow_kernels.ops.launch import autocasts, capturing, without_autocast

# For each network whose runs were compared, by the modes it was in: whether it draws random numbers
# from the default generators.
_draws: WeakKeyDictionary[nn.Module, dict[tuple[bool, ...], bool]] = WeakKeyDictionary()


class Network:
    """A coupling network, with what the walk back asks of its modules looked up once.

    Attributes:
        trained: its parameters that have gradients.
        draws: whether it draws random numbers from the default generators; None before the first
            backward pass through it in these modes.
    """

    def __init__(self, net: nn.Module) -> None:
        modules = [net]
        for module in modules:  # as `net.modules()` finds them, in a third of the time
            modules += [m for m in module._modules.values() if m is not None]
        self.net = net
        self._modules = modules
        self._found = [(m._parameters, k, p) for m in modules for k, p in m._parameters.items()]
        parameters = {id(p): p for *_, p in self._found if p is not None}
        self.trained = [p for p in parameters.values() if p.requires_grad]
        self._modes = tuple(m.training for m in modules)
        self._norms = [m for m in modules if isinstance(m, _NormBase) and m.training]
        self.draws = _draws.get(net, {}).get(self._modes)

    @contextmanager
    def again(self) -> Iterator[None]:
        """While it runs again: in the modes (train, eval) of the first time, whose update of the
        running statistics was the only one.

        Raises:
            RuntimeError: a parameter was exchanged for another tensor.
        """
        if any(place.get(name) is not p for place, name, p in self._found):
            raise_exchanged()
        pairs = zip(self._modules, self._modes, strict=True)
        switched = [(m, mode) for m, mode in pairs if m.training is not mode]
        buffers = [(m, dict(m._buffers)) for m in self._norms]
        for module, mode in switched:
            module.training = mode
        for m in self._norms:
            # In training, a batch is normalized by its own statistics; without running ones, none
            # are updated.
            m._buffers.update(dict.fromkeys(m._buffers))
        try:
            yield
        finally:
            for m, own in buffers:
                m._buffers.update(own)
            for module, mode in switched:
                module.training = not mode

    def fingerprinted(
        self, net_input: Tensor, context: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Run with gradients: params, and fingerprints of all that the gradients depend on.

        These are the input, what the network saves for backward (random masks too), and params. Its
        params alone would not do: they are zero as long as the last layer is.
        """
        own = {
            id(t) for m in self._modules for t in (*m._parameters.values(), *m._buffers.values())
        }
        prints = [fingerprint(net_input)]

        def pack(saved: Tensor) -> Tensor:
            if id(saved) not in own and saved.numel() and not saved.is_complex():
                prints.append(fingerprint(saved))
            return saved.detach()  # itself, it would be part of a cycle, and stay

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            params = self.net(net_input, *context)
        return params, [*prints, fingerprint(params)]

    def changing(self) -> list[tuple[dict[str, Any], str, Tensor, int]]:
        """Its buffers and their versions, but those that `again` takes out of sight."""
        return [
            (m._buffers, name, buffer, buffer._version)
            for m in self._modules
            if m not in self._norms
            for name, buffer in m._buffers.items()
            if buffer is not None and not buffer.is_inference()
        ]

    def remember(self, draws: bool) -> None:
        """Its runs were compared, in these modes."""
        _draws.setdefault(self.net, {})[self._modes] = draws


def raise_exchanged() -> NoReturn:
    raise RuntimeError(
        "ReversibleChain: since the forward pass a parameter was unfrozen, or exchanged for "
        "another tensor, as by torch.func.functional_call; reversible=False allows that"
    )


_ROWS = 16  # projections in a fingerprint
# The largest relative difference that is rounding: bfloat16 rounds to 0.004, and a dropout of one
# number in a thousand makes a difference of 0.045.
_ROUNDING = 0.03


@torch.no_grad()
def fingerprint(t: Tensor) -> Tensor:
    """(17,) float32: projections of parts of t onto a fixed vector, and the norm of t."""
    with without_autocast(t):
        flat = t.reshape(-1).float()
        if flat.numel() % _ROWS:
            flat = F.pad(flat, (0, -flat.numel() % _ROWS))
        rows = flat.view(_ROWS, -1)
        wave = torch.arange(rows.shape[1], dtype=torch.float32, device=t.device).cos_()
        return torch.cat([rows @ wave, flat.norm()[None]])


def difference(first: Sequence[Tensor], again: Sequence[Tensor]) -> Tensor:
    """The largest relative difference of tensors, estimated from their fingerprints, a scalar: inf
    where the numbers of tensors differ; 0 where their first ones do by more than rounding, as the
    walk back then went wrong before the network ran."""
    device = first[0].device
    if len(first) != len(again):
        return torch.full((), math.inf, device=device)
    a, b = (torch.stack([p.to(device) for p in prints]) for prints in (first, again))
    # A projection onto cosines has half of a difference's square.
    distance = math.sqrt(2) * (a - b)[:, :-1].norm(dim=1) / torch.maximum(a[:, -1], b[:, -1])
    distance = distance.nan_to_num(0.0)  # both zero, or diverged
    return torch.where(distance[0] > _ROUNDING / 4, 0.0, distance.max())


def check_repeats(differences: Sequence[tuple[int, Network, bool, Tensor]]) -> None:
    """Read the differences of networks that ran twice, by their place in the chain; remember those
    that repeated themselves, and whether they drew.

    Raises:
        RuntimeError: one did not.
    """
    if not differences:
        return
    found = torch.stack([d for *_, d in differences]).tolist()
    for (place, network, drew, _), value in zip(differences, found, strict=True):
        if value > _ROUNDING:
            raise_not_repeated(
                place, network, f"computed something else (relative difference {value:.2g})"
            )
        network.remember(drew)


def raise_not_repeated(place: int, network: Network, what: str) -> NoReturn:
    raise RuntimeError(
        f"ReversibleChain: run again in the backward pass, network {place} "
        f"({type(network.net).__name__}) {what}: it keeps a state that cannot be put back, such as "
        "a torch.Generator of its own, a counter, or a buffer that it changes. Its gradients would "
        "be wrong; reversible=False allows it"
    )


def check_capturable(network: Network) -> None:
    """Raise RuntimeError unless the network can run twice in a CUDA graph, whose random numbers
    nothing can rewind."""
    if network.draws is None:
        raise RuntimeError(
            "ReversibleChain: before a CUDA graph is captured, run a forward and a backward pass, "
            "which show whether a network draws random numbers"
        )
    if network.draws:
        raise RuntimeError(
            f"ReversibleChain: a network ({type(network.net).__name__}) draws random numbers, "
            "which a CUDA graph cannot draw a second time in the backward pass; reversible=False "
            "allows that"
        )


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


# The CPU generator's state; index, seed and offset of the CUDA device's.
RandomState = tuple[Tensor, tuple[int, int, int] | None]


def random_state(device: torch.device) -> RandomState:
    """The state of the default generators that a network on `device` may draw from."""
    cuda = None
    if device.type == "cuda" and not capturing(device):
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
        cuda = index, generator.initial_seed(), generator.get_offset()
    return torch.get_rng_state(), cuda


def same_random_state(a: RandomState, b: RandomState) -> bool:
    return a[1] == b[1] and torch.equal(a[0], b[0])


@contextmanager
def random_state_of(state: RandomState | None) -> Iterator[None]:
    """Draw the numbers that were drawn from `state`, and leave the generators as they were."""
    if state is None:
        yield
        return
    cpu, cuda = state
    with torch.random.fork_rng([] if cuda is None else [cuda[0]]):
        torch.set_rng_state(cpu)
        if cuda is not None:
            index, seed, offset = cuda
            generator = torch.cuda.default_generators[index]
            generator.manual_seed(seed)
            generator.set_offset(offset)
        yield
