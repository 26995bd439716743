"""A run: layers of another library, one after the other, walked by our kernels.

The layers keep their parameters; a run only holds what each of them does, in the direction
data -> latent, and folds weights anew from the parameters at every call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from mflow_kernels import ops
from mflow_kernels.interop.linear import Linear, Reorder, Rows, permutation, select_channels
from mflow_kernels.layers.chain import walk
from mflow_kernels.ops.launch import accumulator, flow_state, pixels
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.reversible.program import Couple, Mix, Move, Squeezing

# A permutation up to so many channels rides in the launch of a coupling, as a matrix; a wider one,
# and on a CPU nearly every one, is cheaper as an index.
MATRIX_CHANNELS = {"cuda": 128}
MATRIX_CHANNELS_ELSEWHERE = 4

# In torch 2.9 and 2.11, `is_exporting` is true under torch.compile as well.
_TELLS_EXPORT = TorchVersion(torch.__version__) >= "2.13"


@dataclass(frozen=True, eq=False)
class Coupling:
    """An affine coupling on the last channels by the first ones.

    Attributes:
        net: from the channels that stay to params in our order.
        inverse: whether data -> latent is our coupling's inverse.
        stays: how many of C channels stay.
    """

    net: nn.Module
    scale: ScaleFunction
    inverse: bool
    stays: Callable[[int], int]


Part = Linear | Reorder | Coupling | Squeezing


def smaller_half(channels: int) -> int:
    return channels // 2


def larger_half(channels: int) -> int:
    return (channels + 1) // 2


@dataclass(frozen=True)
class Exactly:
    """So many channels stay, of whatever number."""

    count: int

    def __call__(self, channels: int) -> int:
        return self.count


def why_not(parts: Sequence[Part], channels: int) -> str:
    """Why our kernels do not express these parts on states of so many channels; "" if they do."""
    for part in parts:
        if isinstance(part, Squeezing):
            channels *= 4
        elif isinstance(part, Coupling) and (channels < 2 or part.stays(channels) != channels // 2):
            return (
                f"its coupling keeps {part.stays(channels)} of {channels} channels; "
                f"ours keep the first {channels // 2}"
            )
    return ""


class Stretch:
    """Moves without a stop: as many launches as moves, or one reversible function."""

    checkpoint_every: int | None = 8

    def __init__(self) -> None:
        self.moves: list[Move] = []
        self.groups: list[Rows] = []
        self.squeezed: list[int] = []  # how often before each group, data -> latent
        self.drift: Tensor | None = None

    def _record(self, drift: Tensor) -> None:
        self.drift = drift if self.drift is None else torch.maximum(self.drift, drift)

    def inverted(self) -> "Stretch":
        back = Stretch()
        for move in reversed(self.moves):
            if isinstance(move, Couple):
                back.moves.append(Couple(move.net, move.scale, not move.inverse))
            else:
                back.moves.append(Squeezing(True) if isinstance(move, Squeezing) else move)
        for group in self.groups:
            back.groups.append(Rows(group.steps, group.channels, group.device, inverted=True))
        back.squeezed = self.squeezed
        return back

    def walk(
        self, x: Tensor, context: tuple[Tensor, ...], inverse: bool, reversible: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state, the ledger, and the log-determinant that is the same for all samples."""
        area = pixels(x)
        if inverse:
            area *= 4 ** sum(isinstance(move, Squeezing) for move in self.moves)
        areas = [area // 4**squeezed for squeezed in self.squeezed]
        x, _, ledger, log_det = walk(
            self, self.moves, self.groups, areas, x, (), context, reversible
        )
        return x, ledger, log_det


Stops = list["Stretch | tuple[Linear | Reorder, ...]"]


def _planned(parts: Sequence[Part], channels: int, device: torch.device, whole: bool) -> Stops:
    """Stretches, data -> latent, and the permutations between them (none where `whole`)."""
    stops: Stops = []
    stretch, row, squeezed = Stretch(), [], 0  # type: tuple[Stretch, list[Linear | Reorder], int]
    group: Rows | None = None
    widest = MATRIX_CHANNELS.get(device.type, MATRIX_CHANNELS_ELSEWHERE)
    for part in (*parts, None):
        if isinstance(part, (Linear, Reorder)):
            row.append(part)
            continue
        if row and all(p.permutes for p in row) and channels > widest and not whole:
            if stretch.moves:
                stops.append(stretch)
            stops.append(tuple(row))
            stretch, group, squeezed = Stretch(), None, 0
        elif row:
            if group is None:
                group = Rows([], channels, device)
                stretch.groups.append(group)
                stretch.squeezed.append(squeezed)
            stretch.moves.append(Mix(len(stretch.groups) - 1, len(group.steps)))
            group.steps.append(tuple(row))
        row = []
        if isinstance(part, Coupling):
            stretch.moves.append(Couple(part.net, part.scale, part.inverse))
        elif isinstance(part, Squeezing):
            stretch.moves.append(part)
            channels, squeezed, group = 4 * channels, squeezed + 1, None
    if stretch.moves:
        stops.append(stretch)
    return stops


class Run:
    """Layers as parts of ours.

    Args:
        parts: what the layers do, data -> latent.
        reversible: rebuild states in the backward pass in place of keeping them.
    """

    def __init__(self, parts: Sequence[Part], reversible: bool = False) -> None:
        self.parts = tuple(parts)
        self.reversible = reversible
        self.couples = any(isinstance(part, Coupling) for part in parts)
        self._settings = [
            (p.module, p.setting) for p in parts if isinstance(p, Linear) and p.setting
        ]
        self._squeezes = sum(isinstance(part, Squeezing) for part in parts)
        self._plans: dict[Any, Stops] = {}
        self._settled: list[tuple[int, int]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}, "_settled": None}

    def expresses(self, x: Tensor, inverse: bool) -> bool:
        """Whether our kernels do what the layers do to states of so many channels."""
        channels = x.shape[1] // 4**self._squeezes if inverse else x.shape[1]
        return not self.couples or not why_not(self.parts, channels)

    def __call__(
        self, x: Tensor, context: tuple[Tensor, ...] = (), *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """The state and its log-determinant: (N,), or () where it is the same for all samples."""
        x = flow_state("x", x)
        self.settle(x, context, inverse=inverse)
        log_det = x.new_zeros((), dtype=accumulator(x.dtype))
        ledgers = []
        for stop in self._plan(x, inverse):
            if isinstance(stop, Stretch):
                x, ledger, log_s = stop.walk(x, context, inverse, self.reversible)
                ledgers.append(ledger)
                log_det = log_det + log_s
            else:
                order = permutation(stop, x)
                x = select_channels(x, order.argsort() if inverse else order)
        if not self.couples:
            return x, log_det
        ledger = ledgers[0] if len(ledgers) == 1 else torch.cat(ledgers, dim=1)
        return x, ops.accumulate_logdet(ledger, log_det)

    def _plan(self, x: Tensor, inverse: bool) -> Stops:
        channels = x.shape[1] // 4**self._squeezes if inverse else x.shape[1]
        # Not by the device itself, on which compilers cannot guard where it is a key.
        key = channels, x.device.type, x.device.index, inverse
        if key not in self._plans:
            plan = _planned(self.parts, channels, x.device, self.reversible)
            if inverse:
                plan = [s.inverted() if isinstance(s, Stretch) else s for s in reversed(plan)]
            self._plans[key] = plan
        return self._plans[key]

    def _is_settled(self) -> bool:
        """Whether every layer that is set from a first batch was, without a look at the GPU where
        nothing changed since the last one."""
        states = []
        for module, setting in self._settings:
            state = None if setting.state is None else setting.state(module)
            if state is not None and not state.is_inference():  # those count no versions
                states.append((id(state), state._version))
            elif setting.unset(module):
                return False
        if states == self._settled:
            return True
        if any(setting.unset(module) for module, setting in self._settings):
            return False
        self._settled = states
        return True

    def settle(self, x: Tensor, context: tuple[Tensor, ...] = (), *, inverse: bool) -> None:
        """Set layers that wait for their first batch from what reaches them, part by part. An
        exported program sets nothing."""
        exporting = torch.compiler.is_exporting()
        if not _TELLS_EXPORT and torch.compiler.is_dynamo_compiling():
            exporting = False
        if self._settings and not exporting:
            self._settle(x, context, inverse)

    @torch.compiler.disable  # it branches on tensors
    @torch.no_grad()
    def _settle(self, x: Tensor, context: tuple[Tensor, ...], inverse: bool) -> None:
        if self._is_settled():
            return
        for part in reversed(self.parts) if inverse else self.parts:
            if isinstance(part, Linear) and part.setting is not None:
                if part.setting.unset(part.module):
                    part.setting.set_from(part.module, x, inverse)
                alone = Run([Linear(part.module, part.read)])
            else:
                alone = Run([part])
            x, _ = alone(x, context, inverse=inverse)
