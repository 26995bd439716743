"""A sequence of layers of another library, computed by our kernels.

The layers keep their parameters. A `FusedSequence` only knows what each layer does, in the
direction data -> latent, and folds the weights from the parameters in every call.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from mflow_kernels.interop.affine import AffineMap
from mflow_kernels.interop.fixed import FixedMatrix, Permute, ScaledPermutation
from mflow_kernels.interop.linear import Linear, Reorder, Row
from mflow_kernels.interop.orders import versions
from mflow_kernels.interop.parts import Coupling, Elementwise, Part, why_not
from mflow_kernels.interop.splines import SplineMap
from mflow_kernels.ops.layouts import flow_state
from mflow_kernels.ops.logdet import sum_ledger
from mflow_kernels.ops.spline import Spline
from mflow_kernels.reversible.apply import apply_reversibly, apply_stored
from mflow_kernels.reversible.couples import AffineCouple, SplineCouple
from mflow_kernels.reversible.instructions import Instruction, Layer
from mflow_kernels.reversible.program import Program
from mflow_kernels.reversible.rearrangements import SpaceToDepth
from mflow_kernels.reversible.steps import Step, Steps

# The most channels whose permutations and fixed matrices run as one matrix with the actnorms around
# them, inside the launch of a coupling. With more channels they run apart, without dense gradients.
MATRIX_CHANNELS = {
    "cpu": {"permutation": 4, "scaled": 32, "fixed": 64},
    "cuda": {"permutation": 128, "scaled": 128, "fixed": 1 << 30},
}

# In torch 2.9 and 2.11, `is_exporting` is also true under torch.compile.
_EXPORT_IS_EXACT = TorchVersion(torch.__version__) >= "2.13"


def _program(
    parts: Sequence[Part], channels: int, device: torch.device, reversible: bool
) -> Program:
    """The program of these parts, data -> latent, on states of `channels` channels."""
    instructions: list[Instruction] = []
    # Without a coupling, no launch could be shared with a permutation.
    alone = not any(isinstance(part, Coupling) for part in parts)
    row: list[Linear | Reorder] = []  # linear parts since the last coupling or squeeze
    for part in (*parts, None):
        if isinstance(part, (Linear, Reorder)):
            row.append(part)
            continue
        permutes = alone and row and all(p.permutes for p in row)
        instructions += [Permute(row)] if permutes else _linear(row, channels, device)
        row = []
        if isinstance(part, Coupling):
            instructions.append(_couple(part, channels, reversible))
        elif isinstance(part, Elementwise):
            instructions.append(Layer(part.layer, part.inverse))
        elif isinstance(part, SpaceToDepth):
            instructions.append(part)
            channels = int(channels * 4.0**part.halvings)
    return Program(instructions)


def _couple(part: Coupling, channels: int, reversible: bool) -> Instruction:
    kept = part.unchanged(channels)
    halves = kept == channels // 2 > 0
    if not isinstance(part.scale, Spline):
        if halves:
            return Steps([Step(None, AffineCouple(part.net, part.scale, part.inverse))])
        return Layer(AffineMap(part.net, part.scale, kept), part.inverse)
    # A spline shares no launch with its neighbours, and alone it takes less time on the host.
    if halves and reversible:
        return Steps([Step(None, SplineCouple(part.net, part.scale, part.inverse))])
    return Layer(SplineMap(part.net, part.scale, kept), part.inverse)


def _linear(
    row: Sequence[Linear | Reorder], channels: int, device: torch.device
) -> Sequence[Instruction]:
    """The instructions of the linear parts between two couplings."""
    if not row:
        return []
    most = MATRIX_CHANNELS.get(device.type, MATRIX_CHANNELS["cpu"])
    light = [p.permutes or p.scales for p in row]
    if all(p.permutes for p in row) and channels > most["permutation"]:
        return [Permute(row)]
    if all(light) and channels > most["scaled"]:
        return [Steps([Step(ScaledPermutation(row, channels, device), None)])]
    if all(k or p.fixed for k, p in zip(light, row, strict=True)) and channels > most["fixed"]:
        made: list[Instruction] = []
        for is_light, group in groupby(row, lambda p: p.permutes or p.scales):
            members = list(group)
            if is_light:
                made += _linear(members, channels, device)
            else:
                made += [FixedMatrix(p, channels, device) for p in members if isinstance(p, Linear)]
        return made
    return [Steps([Step(Row(row, channels, device), None)])]


class FusedSequence:
    """Layers in sequence, computed by our kernels.

    Args:
        parts: what the layers do, data -> latent.
        reversible: rebuild the states in the backward pass instead of storing them.

    Attributes:
        drift: largest drift of its programs, as `ReversibleChain.drift`.
    """

    checkpoint_every: int | None = 8

    def __init__(self, parts: Sequence[Part], reversible: bool = False) -> None:
        self.parts, self.reversible = tuple(parts), reversible
        self.drift: Tensor | None = None
        self.has_couplings = any(isinstance(part, Coupling) for part in parts)
        self._scales = any(isinstance(part, Linear) and not part.permutes for part in parts)
        self._has_ledger = any(isinstance(part, (Coupling, Elementwise)) for part in parts)
        self._initialized_by_data = [
            (p.module, p.data_init) for p in parts if isinstance(p, Linear) and p.data_init
        ]
        self._fits = [
            p.fits for p in parts if isinstance(p, (Linear, Reorder, Coupling)) and p.fits
        ]
        self._squeezes = sum(p.halvings for p in parts if isinstance(p, SpaceToDepth))
        self._programs: dict[Any, Program] = {}
        self._initialized: tuple[list[tuple[int, int]], list[bool]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_programs": {}, "_initialized": None}

    def record_drift(self, drift: Tensor) -> None:
        self.drift = drift if self.drift is None else torch.maximum(self.drift, drift)

    def supports(self, x: Tensor, inverse: bool) -> bool:
        """Whether our kernels compute what the layers do now, for the number of channels of x."""
        if not all(fits(x) for fits in self._fits):
            return False
        return not self.has_couplings or not why_not(self.parts, self._data_channels(x, inverse))

    def __call__(
        self, x: Tensor, context: tuple[Tensor, ...] = (), *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the state and the log-determinant: (N,), or () if all samples have the same."""
        x = flow_state("x", x)
        self.initialize_from(x, context, inverse=inverse)
        program = self._program_for(x, inverse)
        if not self.reversible and len(program.instructions) == 1:
            (alone,) = program.instructions
            if isinstance(alone, Layer):  # vectors are small, so the time on the host counts
                result: tuple[Tensor, Tensor] = alone.calls[0].function(x, *context)
                return result
        if self.reversible:
            every, record = self.checkpoint_every, self.record_drift
            found = apply_reversibly(program, x, (), context, every, record)
        else:
            found = apply_stored(program, x, (), context)
        if not self._has_ledger and found.constant is not None:
            return found.x, found.constant
        return found.x, found.logdet if self._scales else sum_ledger(found.ledger)

    def _data_channels(self, x: Tensor, inverse: bool) -> int:
        return int(x.shape[1] / 4.0**self._squeezes) if inverse else x.shape[1]

    def _program_for(self, x: Tensor, inverse: bool) -> Program:
        channels = self._data_channels(x, inverse)
        # A compiler cannot guard on a device that is part of a key, so type and index stand for it.
        key = channels, x.device.type, x.device.index, inverse
        if key not in self._programs:
            program = _program(self.parts, channels, x.device, self.reversible)
            self._programs[key] = program.inverted() if inverse else program
        return self._programs[key]

    def _is_initialized(self) -> bool:
        """Whether every layer with data-dependent initialization has had its first batch.

        Unless a tensor has changed since the last call, this reads nothing from the GPU.
        """
        states = [d.state(module) for module, d in self._initialized_by_data if d.state]
        known = versions(states) if len(states) == len(self._initialized_by_data) else None
        modes = [module.training for module, _ in self._initialized_by_data]
        now = None if known is None else (known, modes)
        if now is not None and now == self._initialized:
            return True
        if any(data_init.is_pending(module) for module, data_init in self._initialized_by_data):
            return False
        self._initialized = now
        return True

    def initialize_from(
        self, x: Tensor, context: tuple[Tensor, ...] = (), *, inverse: bool
    ) -> None:
        """Initialize the layers that wait for their first batch from the state that reaches them.

        An exported program initializes nothing.
        """
        exporting = torch.compiler.is_exporting()
        if not _EXPORT_IS_EXACT and torch.compiler.is_dynamo_compiling():
            exporting = False
        if self._initialized_by_data and not exporting:
            self._initialize_parts(x, context, inverse)

    @torch.compiler.disable  # it branches on tensors
    @torch.no_grad()
    def _initialize_parts(self, x: Tensor, context: tuple[Tensor, ...], inverse: bool) -> None:
        if self._is_initialized():
            return
        for part in reversed(self.parts) if inverse else self.parts:
            if isinstance(part, Linear) and part.data_init is not None:
                if part.data_init.is_pending(part.module):
                    part.data_init.initialize(part.module, x, inverse)
                alone = FusedSequence([Linear(part.module, part.read)])
            else:
                alone = FusedSequence([part])
            x, _ = alone(x, context, inverse=inverse)
