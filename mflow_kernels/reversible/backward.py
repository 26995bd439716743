"""The backward pass of a program whose forward pass stored few states and no activations.

It undoes the instructions from last to first, and rebuilds each state together with its gradient.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels.ops.conv1x1 import invert
from mflow_kernels.ops.layouts import is_channels_last
from mflow_kernels.ops.precision import accumulator, without_autocast
from mflow_kernels.ops.rebuild_conv1x1 import rebuild_conv1x1, rebuild_splits
from mflow_kernels.ops.rebuild_coupling import rebuild_coupling
from mflow_kernels.reversible.program import (
    ChannelLinear,
    Couple,
    Instruction,
    LinearGroup,
    SpaceToDepth,
    SplitOff,
)
from mflow_kernels.reversible.rerun import RerunNetwork, check_repeats


class BackwardPass:
    """Undoes instructions one by one, holding the state and its gradient as two halves.

    A coupling leaves half `a` unchanged and a channel-linear map reads both halves, so the halves
    stay separate tensors between the two. `dnet` is the gradient that the last network returned for
    its input. The next launch adds it to the gradient of `a`.

    Args:
        x, dx: the state at the end of the program and its gradient.
        groups: the groups that `ChannelLinear` instructions name. Their weights are folded again,
            one group at a time.
        context: further inputs of every network.
        autocast: arguments of the `torch.autocast` that was active.
    """

    dnet: Tensor | None
    net_input: Tensor | None
    _whole: tuple[Tensor, Tensor] | None

    def __init__(
        self,
        x: Tensor,
        dx: Tensor,
        groups: Sequence[LinearGroup],
        context: Sequence[Tensor],
        autocast: dict[str, Any],
    ) -> None:
        self.groups, self.autocast = groups, autocast
        self.context = [c.detach().requires_grad_(c.requires_grad) for c in context]
        self.gradients: dict[int, Tensor] = {}  # of parameters and context, by id
        self.gathered: _GroupGradients | None = None
        self._set(x, dx)

    def undo(
        self,
        instructions: Sequence[Instruction],
        networks: Sequence[RerunNetwork],
        latents: Sequence[Tensor],
        dlatents: Sequence[Tensor],
        dlog_dets: Mapping[int, Tensor],
        dlogdet: Tensor,
        stored: dict[int, tuple[Tensor, Tensor]],
    ) -> list[Tensor]:
        """Undo these instructions; `x` and `dx` are then the state before them and its gradient.

        The gradients of parameters and of the context add up over calls.

        Args:
            instructions: the last instructions that are not yet undone, in forward order.
            networks: the networks of these instructions, in forward order.
            latents, dlatents: the latents that these instructions split off, and their gradients.
            dlog_dets: for each group of these instructions, the gradient of its log_det.
            dlogdet: (N,), the gradient of the log-determinant of each sample.
            stored: stored states and the inputs of the networks after them, by the ordinal of that
                network. They are not rebuilt.

        Returns:
            The gradients of the latents that these instructions joined, the last one first.

        Raises:
            RuntimeError: a network did not repeat its first run.
        """
        # dlogdet is often one number that autograd expanded. Copy it once here, so that no launch
        # has to.
        self.dlog_dets, self.dlogdet = dlog_dets, dlogdet.contiguous()
        split_off, joined = list(zip(latents, dlatents, strict=True)), []
        waiting = list(networks)
        for i in reversed(range(len(instructions))):
            instruction = instructions[i]
            if isinstance(instruction, Couple):
                network = waiting.pop()
                self._undo_couple(instruction, network, stored.get(network.ordinal))
            elif isinstance(instruction, ChannelLinear):
                network_next = i > 0 and isinstance(instructions[i - 1], Couple)
                rebuild = not (network_next and waiting[-1].ordinal in stored)
                self._undo_linear(instruction, network_next, rebuild)
            elif isinstance(instruction, SpaceToDepth):
                back = SpaceToDepth(not instruction.inverse)
                self._set(back(self.x), back(self.dx))
            elif isinstance(instruction, SplitOff):
                latent, dlatent = split_off.pop()
                self._set_halves(self.x, latent, self.dx, dlatent)
            else:
                joined.append(self.db)
                self._set(self.a, self._add_dnet())
        check_repeats(networks[::-1])
        return joined

    @property
    def context_gradients(self) -> list[Tensor | None]:
        return [self.gradients.get(id(c)) for c in self.context]

    @property
    def x(self) -> Tensor:
        """The state as one tensor."""
        return self._whole[0] if self._whole else torch.cat([self.a, self.b], dim=1)

    @property
    def dx(self) -> Tensor:
        """The gradient of the state as one tensor."""
        return self._whole[1] if self._whole else torch.cat([self._add_dnet(), self.db], dim=1)

    def _set(self, x: Tensor, dx: Tensor) -> None:
        c_a = x.shape[1] // 2
        self.channels_last = is_channels_last(x)
        self._set_halves(x[:, :c_a], x[:, c_a:], dx[:, :c_a], dx[:, c_a:])
        self._whole = x, dx

    def _set_halves(self, a: Tensor, b: Tensor, da: Tensor, db: Tensor) -> None:
        self.a, self.b, self.da, self.db = a, b, da, db
        self.dnet = self.net_input = None
        self._whole = None

    def _add_dnet(self) -> Tensor:
        return self.da if self.dnet is None else self.da + self.dnet

    def _undo_couple(
        self, instruction: Couple, network: RerunNetwork, stored: tuple[Tensor, Tensor] | None
    ) -> None:
        if stored is not None:
            state, self.net_input = stored
            c_a = state.shape[1] // 2
            self.a, self.b = state[:, :c_a], state[:, c_a:]
        net_input = self.net_input
        if net_input is None:
            net_input = torch.empty_like(self.a, dtype=self._network_dtype()).copy_(self.a)
        with torch.enable_grad(), torch.autocast(**self.autocast):
            net_input = net_input.detach().requires_grad_()
            params = network.run_again(net_input, self.context)
        b, db, dparams = rebuild_coupling(
            self.b,
            self.db,
            self.dlogdet,
            params.detach(),
            instruction.scale,
            instruction.inverse,
            stored is not None,
        )
        dnet = self._network_backward(network.trained, net_input, params, dparams)
        self._set_halves(self.a, b, self._add_dnet(), db)
        self.dnet = dnet

    def _network_backward(
        self, parameters: list[nn.Parameter], net_input: Tensor, params: Tensor, dparams: Tensor
    ) -> Tensor | None:
        """Return the gradient of the network's input; add the others to the running sums."""
        if not params.requires_grad:
            return None
        sources = [*parameters, *(c for c in self.context if c.requires_grad)]
        dnet, *gradients = torch.autograd.grad(
            params, [net_input, *sources], dparams, allow_unused=True
        )
        self._add_gradients(sources, gradients)
        return dnet

    def _add_gradients(self, sources: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        for source, g in zip(sources, gradients, strict=True):
            if g is not None:
                total = self.gradients.get(id(source))
                self.gradients[id(source)] = g if total is None else total + g

    def _undo_linear(self, instruction: ChannelLinear, network_next: bool, rebuild: bool) -> None:
        if self.gathered is None:
            self.gathered = _GroupGradients(
                self.groups[instruction.group],
                self.dlog_dets[instruction.group],
                accumulator(self.db.dtype),
            )
        weight, bias, inverse = self.gathered.row(instruction.row)
        splits = rebuild_splits(self.b, len(bias))
        outer_sum, dbias = self.gathered.partial_sums(instruction.row, splits)
        # A coupling reads the two halves next; every other instruction reads one tensor.
        made = rebuild_conv1x1(
            (self.a, self.b),
            (self.da, self.db),
            self.dnet,
            weight,
            inverse if rebuild else None,
            bias,
            self._network_dtype() if network_next else None,
            self.channels_last,
            network_next,
            outer_sum,
            dbias,
        )
        if not self.gathered.remaining:
            self._add_gradients(*self.gathered.parameter_gradients())
            self.gathered = None
        # If the state is stored, x is None, and dx takes its place until `_undo_couple` reads the
        # stored state.
        self._set_halves(*(made.x or made.dx), *made.dx)
        if made.whole is not None:
            x, dx = made.whole
            self._whole = dx if x is None else x, dx
        self.net_input = made.net

    def _network_dtype(self) -> torch.dtype:
        """`autocast_dtype` of the state in the forward pass."""
        casts = self.autocast["enabled"] and self.db.dtype != torch.float64
        return self.autocast["dtype"] if casts else self.db.dtype


PARTIALS_BYTES = 2**26  # most bytes of partial outer sums that wait for one reduction


class _GroupGradients:
    """The folded weights of one group, and the sums from which their gradients follow."""

    def __init__(self, group: LinearGroup, dlog_det: Tensor, dtype: torch.dtype) -> None:
        self.group, self.dlog_det = group, dlog_det
        with torch.enable_grad():
            self.folded = group.folded(dtype)
        self.inverse = invert(self.folded.weight.detach().double())[0]
        # LAPACK and cuSOLVER return contiguous columns, and the kernels read rows.
        self.rounded_inverse = self.inverse.to(self.folded.weight.dtype).contiguous()
        self.remaining = len(group.steps)
        self.partials: tuple[Tensor, Tensor] | None = None
        self.waiting: list[int] = []  # the steps whose partial sums are in `partials`
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}

    def row(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """The weight, the bias and the inverse weight of a step."""
        weight, bias = (t.detach()[row] for t in self.folded[:2])
        return weight, bias, self.rounded_inverse[row]

    def partial_sums(self, row: int, splits: int) -> tuple[Tensor, Tensor]:
        """Buffers for a step's partial outer sums (splits, C, C) and d bias (splits, C).

        The steps share one buffer of at most `PARTIALS_BYTES`, which one launch reduces.
        """
        if self.partials is not None:
            steps, allocated = self.partials[0].shape[:2]
            if len(self.waiting) == steps or allocated != splits:
                self._reduce()
        if self.partials is None:
            weight = self.folded.weight.detach()
            c = weight.shape[-1]
            fit = PARTIALS_BYTES // (splits * c * c * weight.element_size())
            steps = max(1, min(self.remaining, fit))
            self.partials = (
                weight.new_empty((steps, splits, c, c)),
                weight.new_empty((steps, splits, c)),
            )
        self.remaining -= 1
        self.waiting.append(row)
        return self.partials[0][len(self.waiting) - 1], self.partials[1][len(self.waiting) - 1]

    def _reduce(self) -> None:
        if self.partials is not None:
            outer_sums, dbiases = (part[: len(self.waiting)].sum(1) for part in self.partials)
            self.sums.update({r: (outer_sums[i], dbiases[i]) for i, r in enumerate(self.waiting)})
            self.partials, self.waiting = None, []

    def parameter_gradients(self) -> tuple[list[nn.Parameter], tuple[Tensor | None, ...]]:
        """The group's parameters and their gradients, from dW = outer_sum W^-T and d bias."""
        # A step that occurs twice lists its parameters twice, and autograd would return the whole
        # gradient for each occurrence.
        parameters = list({id(p): p for p in self.group.parameters()}.values())
        if not parameters:
            return [], ()
        self._reduce()
        rows = [self.sums[row] for row in range(len(self.group.steps))]
        outer_sum, dbias = (torch.stack(part) for part in zip(*rows, strict=True))
        with without_autocast(outer_sum):
            dweight = (outer_sum.double() @ self.inverse.mT).to(outer_sum.dtype)
            gradients = torch.autograd.grad(
                tuple(self.folded), parameters, (dweight, dbias, self.dlog_det), allow_unused=True
            )
        return parameters, gradients
