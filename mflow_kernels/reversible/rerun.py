"""Running a coupling network a second time so that it repeats its first run.

A reversible backward pass runs each network again. The second run must draw the same random
numbers, use the same modes and the same autocast, and leave running statistics alone. This module
arranges that. It cannot restore other state, such as a network's own `torch.Generator` or a
counter, and the gradients would then be wrong without an error. The first backward pass of every
network therefore compares fingerprints of both runs, and raises if they differ.
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

from mflow_kernels.ops.launch import capturing
from mflow_kernels.ops.precision import autocasts, without_autocast

# Whether a network draws random numbers from the default generators, by network and by the modes in
# which it ran. Filled when the two runs of a network have been compared.
_draws: WeakKeyDictionary[nn.Module, dict[tuple[bool, ...], bool]] = WeakKeyDictionary()


class RerunNetwork:
    """A coupling network that a backward pass will run again, and its modules, listed once.

    Attributes:
        ordinal: its place in the order in which the networks of a program run.
        trained: its trainable parameters.
        draws: whether it draws random numbers from the default generators; None until a backward
            pass has run through it in these modes.
        random: the random state from which its first run started; None if it drew no numbers.
        fingerprints: those of its first run; None if the second run need not be compared with it.
        difference: the `difference` of its two runs, if they were compared.
    """

    random: "RandomState | None" = None
    fingerprints: list[Tensor] | None = None
    difference: Tensor | None = None

    def __init__(self, net: nn.Module, ordinal: int = 0) -> None:
        modules = [net]
        for module in modules:  # `net.modules()` takes three times as long
            modules += [m for m in module._modules.values() if m is not None]
        self.net, self.ordinal = net, ordinal
        self._modules = modules
        self._found = [(m._parameters, k, p) for m in modules for k, p in m._parameters.items()]
        parameters = {id(p): p for *_, p in self._found if p is not None}
        self.trained = [p for p in parameters.values() if p.requires_grad]
        self._modes = tuple(m.training for m in modules)
        self._norms = [m for m in modules if isinstance(m, _NormBase) and m.training]
        self.draws = _draws.get(net, {}).get(self._modes)

    def run_again(self, net_input: Tensor, context: Sequence[Tensor]) -> Tensor:
        """The network's params, computed as in its first run. Gradients must be enabled.

        Raises:
            RuntimeError: a parameter was replaced by another tensor, or the network changed a
                buffer.
        """
        with self._as_in_forward():
            if self.fingerprints is None:
                params: Tensor = self.net(net_input, *context)
                return params
            # Running statistics are hidden.
            versions = [
                (m._buffers, name, buffer, buffer._version)
                for m in self._modules
                if m not in self._norms
                for name, buffer in m._buffers.items()
                if buffer is not None and not buffer.is_inference()
            ]
            params, fingerprints = self.run_with_fingerprints(net_input, context)
            for buffers, name, buffer, version in versions:
                if buffers.get(name) is not buffer or buffer._version != version:
                    self.raise_not_repeated(f"changed its buffer {name} again")
        self.difference = difference(self.fingerprints, fingerprints)
        return params

    @contextmanager
    def _as_in_forward(self) -> Iterator[None]:
        """Restore the modes (train, eval) and random numbers of the first run, and hide running
        statistics."""
        if any(parameters.get(name) is not p for parameters, name, p in self._found):
            raise_replaced()
        pairs = zip(self._modules, self._modes, strict=True)
        switched = [(m, mode) for m, mode in pairs if m.training is not mode]
        buffers = [(m, dict(m._buffers)) for m in self._norms]
        for module, mode in switched:
            module.training = mode
        for m in self._norms:
            # In training, a norm uses the statistics of its batch. Without buffers for the running
            # ones, it does not update them a second time.
            m._buffers.update(dict.fromkeys(m._buffers))
        try:
            with random_state_of(self.random):
                yield
        finally:
            for m, original in buffers:
                m._buffers.update(original)
            for module, mode in switched:
                module.training = not mode

    def run_with_fingerprints(
        self, net_input: Tensor, context: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The network's params, and fingerprints of everything that its gradients depend on.

        These are its input, the tensors it saves for backward (random masks included), and params.
        Params alone are not enough, because they are zero while the last layer is zero. Gradients
        must be enabled.
        """
        known = {
            id(t) for m in self._modules for t in (*m._parameters.values(), *m._buffers.values())
        }
        fingerprints = [fingerprint(net_input)]

        def pack(saved: Tensor) -> Tensor:
            if id(saved) not in known and saved.numel() and not saved.is_complex():
                fingerprints.append(fingerprint(saved))
            return saved.detach()  # `saved` itself would form a reference cycle

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            params = self.net(net_input, *context)
        return params, [*fingerprints, fingerprint(params)]

    def raise_not_repeated(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"ReversibleChain: run again in the backward pass, network {self.ordinal} "
            f"({type(self.net).__name__}) {what}: it has state that cannot be restored, such as "
            "its own torch.Generator, a counter, or a buffer that it changes. Its gradients would "
            "be wrong; reversible=False allows it"
        )

    def remember(self, draws: bool) -> None:
        """Record that its two runs agreed in these modes, and whether they drew random numbers."""
        _draws.setdefault(self.net, {})[self._modes] = draws


def raise_replaced() -> NoReturn:
    raise RuntimeError(
        "ReversibleChain: after the forward pass a parameter was unfrozen, or replaced by another "
        "tensor (as torch.func.functional_call does); reversible=False allows that"
    )


_ROWS = 16  # projections in a fingerprint
# A larger relative difference is not rounding: bfloat16 rounds to 0.004, and dropping one number in
# a thousand makes a difference of 0.045.
_ROUNDING = 0.03


@torch.no_grad()
def fingerprint(t: Tensor) -> Tensor:
    """(17,) float32: the projections of 16 parts of t onto a fixed vector, and the norm of t."""
    with without_autocast(t):
        flat = t.reshape(-1).float()
        if flat.numel() % _ROWS:
            flat = F.pad(flat, (0, -flat.numel() % _ROWS))
        rows = flat.view(_ROWS, -1)
        wave = torch.arange(rows.shape[1], dtype=torch.float32, device=t.device).cos_()
        return torch.cat([rows @ wave, flat.norm()[None]])


def difference(first: Sequence[Tensor], again: Sequence[Tensor]) -> Tensor:
    """The largest relative difference of two lists of tensors, estimated from their fingerprints.

    Each difference is divided by the norm of its tensor, or by a third of the largest norm in the
    list if that is larger.

    Returns:
        A scalar. It is inf if the lists differ in length. It is 0 if the network's inputs, the
        first tensors, differ by more than rounding: the rebuilt state is then at fault, not the
        network.
    """
    device = first[0].device
    if len(first) != len(again):
        return torch.full((), math.inf, device=device)
    a, b = (torch.stack([p.to(device) for p in fingerprints]) for fingerprints in (first, again))
    norm = torch.maximum(a[:, -1], b[:, -1])
    # If nearly all units of a layer are off, its norm is small, and rounding can switch units.
    scale = torch.maximum(norm, norm.max() / 3)
    # The mean of cos^2 is 1/2, so a projection has half of the difference's squared norm.
    distance = math.sqrt(2) * (a - b)[:, :-1].norm(dim=1) / scale
    distance = distance.nan_to_num(0.0)  # both zero, or diverged
    return torch.where(distance[0] > _ROUNDING / 4, 0.0, distance.max())


def check_repeats(networks: Sequence[RerunNetwork]) -> None:
    """Check the networks whose two runs were compared, and remember that they agreed.

    Raises:
        RuntimeError: a network computed something else.
    """
    differences = {n: n.difference for n in networks if n.difference is not None}
    if not differences:
        return
    found = torch.stack(list(differences.values())).tolist()
    for network, value in zip(differences, found, strict=True):
        if value > _ROUNDING:
            network.raise_not_repeated(f"computed something else (relative difference {value:.2g})")
        network.remember(network.random is not None)


def check_capturable(network: RerunNetwork) -> None:
    """Raise RuntimeError unless the network can run twice in a CUDA graph.

    A graph cannot restore the random state, so the network must not draw random numbers.
    """
    if network.draws is None:
        raise RuntimeError(
            "ReversibleChain: before capturing a CUDA graph, run one forward and backward pass, "
            "which shows whether a network draws random numbers"
        )
    if network.draws:
        raise RuntimeError(
            f"ReversibleChain: a network ({type(network.net).__name__}) draws random numbers, "
            "which a CUDA graph cannot draw a second time in the backward pass; reversible=False "
            "allows that"
        )


def autocast_state(device: torch.device) -> dict[str, Any]:
    """Arguments of a `torch.autocast` like the active one, but without its cache of cast weights.

    The backward pass must not use a weight that the forward pass cast without gradients.
    """
    kind = "cpu" if device.type == "meta" else device.type  # torch.autocast does not know "meta"
    return {
        "device_type": kind,
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": autocasts(device),
        "cache_enabled": False,
    }


# The state of the CPU generator, and index, seed and offset of the CUDA device's generator.
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
    """Draw from `state` inside the context, and restore the generators afterwards."""
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
