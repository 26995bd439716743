"""Programs: the instructions that a sequence of flow layers executes on a state.

Layers return the instructions that they consist of. `execute` runs a program with as few launches
as possible (a coupling and the 1x1 convolution after it share one), and `BackwardPass` in
`reversible.backward` undoes it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mflow_kernels.ops.checks import check_device
from mflow_kernels.ops.conv1x1 import conv1x1_eager, conv1x1_forward, conv1x1_op, spread
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
from mflow_kernels.ops.layouts import cut_net_input, in_layout_of, is_channels_last, pixels
from mflow_kernels.ops.partial_sums import unbind_weights
from mflow_kernels.ops.precision import accumulator, autocast_dtype
from mflow_kernels.ops.registration import eager_function
from mflow_kernels.ops.scale import ScaleFunction

PRECISION = "tf32x3"


class ChannelLinear(NamedTuple):
    """x -> W x + bias at each pixel, with the weights in row `row` of group `group`."""

    group: int
    row: int


class Couple(NamedTuple):
    """The affine coupling with this network, or its inverse."""

    net: nn.Module
    scale: ScaleFunction
    inverse: bool


@dataclass(frozen=True, eq=False)  # torch 2.9 can trace neither a NamedTuple's __call__ nor a hash
class SpaceToDepth:
    """(N, C, H, W) -> (N, 4C, H/2, W/2), or back if `inverse`, in `F.pixel_unshuffle`'s channel
    order.

    It makes one copy. State and gradient keep their memory layout. `F.pixel_unshuffle` would keep
    channels_last on a CPU only, and return contiguous tensors on CUDA.

    Raises:
        ValueError: x has another number of axes, odd H or W, or (inverse) a number of channels
            that 4 does not divide.
    """

    inverse: bool

    def __call__(self, x: Tensor) -> Tensor:
        if self.inverse and (x.dim() != 4 or x.shape[1] % 4):
            raise ValueError(f"z: expected (N, 4C, H, W), got {tuple(x.shape)}")
        if not self.inverse and (x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2):
            raise ValueError(f"x: expected (N, C, H, W) with even H and W, got {tuple(x.shape)}")
        if not len(x):  # torch returns an empty batch unchanged
            n, c, h, w = x.shape
            return x.reshape(
                (n, c // 4, 2 * h, 2 * w) if self.inverse else (n, 4 * c, h // 2, w // 2)
            )
        by_torch = F.pixel_shuffle if self.inverse else F.pixel_unshuffle
        if transformed() or not is_channels_last(x):
            return by_torch(x, 2)
        if _computes_on_cpu(x) and not torch.compiler.is_compiling():
            # torch's CPU kernel keeps channels_last and takes less time than the copy below.
            z = by_torch(x, 2)
            if is_channels_last(z):
                return z
        return _SqueezeChannelsLast.apply(x, self.inverse)


def _computes_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"  # a function, so that a report can count a GPU's launches


class _SqueezeChannelsLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: bool) -> Tensor:
        ctx.inverse = inverse
        rows = x.permute(0, 2, 3, 1)
        n, h, w, c = rows.shape
        if inverse:
            blocks = rows.reshape(n, h, w, c // 4, 2, 2).permute(0, 1, 4, 2, 5, 3)
            shape = (n, c // 4, 2 * h, 2 * w)
        else:
            blocks = rows.reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 5, 2, 4)
            shape = (n, 4 * c, h // 2, w // 2)
        last = torch.channels_last
        z = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=last)
        z.permute(0, 2, 3, 1).view(blocks.shape).copy_(blocks)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        return SpaceToDepth(not ctx.inverse)(dz), None


class SplitOff(NamedTuple):
    """Remove the second half of the channels from the state; it becomes a latent."""


class Join(NamedTuple):
    """Append the next latent to the state as its second half of channels."""


Instruction = ChannelLinear | Couple | SpaceToDepth | SplitOff | Join


class FoldedWeights(NamedTuple):
    """The linear maps of a group of K steps, each folded into one 1x1 convolution."""

    weight: Tensor  # (K, C, C)
    bias: Tensor  # (K, C)
    log_det: Tensor  # (), sum over the steps of log |det weight|, for one pixel


class LinearGroup(Protocol):
    """Consecutive steps of one width, in the direction in which the program runs them."""

    @property
    def steps(self) -> Sized:
        """The K steps."""

    def folded(self, dtype: torch.dtype, *, check: bool = False) -> FoldedWeights:
        """The weights that `ChannelLinear` instructions of this group refer to.

        Raises:
            ValueError: with `check`, if an inverse is needed and does not exist.
        """

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters that `folded` depends on."""

    def inverted(self) -> "LinearGroup":
        """The inverse maps. The steps keep their rows."""


@dataclass(eq=False)
class Program:
    """Instructions, and the groups of linear maps that they name.

    Attributes:
        instructions: in the order in which they run.
        groups: the linear maps of group i, for `ChannelLinear(i, row)`.
    """

    instructions: list[Instruction] = field(default_factory=list)
    groups: list[LinearGroup] = field(default_factory=list)

    @property
    def total_squeezes(self) -> int:
        """The number of `SpaceToDepth` instructions."""
        return sum(isinstance(i, SpaceToDepth) for i in self.instructions)

    def inverted(self) -> "Program":
        """The program that undoes this one."""
        return Program(
            [inverse_instruction(i) for i in reversed(self.instructions)],
            [group.inverted() for group in self.groups],
        )

    def group_pixels(self, x: Tensor) -> list[int]:
        """For each group, the number of pixels of its states; x is the state at the start."""
        count, found = pixels(x), [0] * len(self.groups)
        for instruction in self.instructions:
            if isinstance(instruction, SpaceToDepth):
                count = 4 * count if instruction.inverse else count // 4
            elif isinstance(instruction, ChannelLinear):
                found[instruction.group] = count
        return found


def inverse_instruction(instruction: Instruction) -> Instruction:
    """The instruction that undoes this one. A `ChannelLinear` stays: its group is inverted."""
    if isinstance(instruction, Couple):
        return Couple(instruction.net, instruction.scale, not instruction.inverse)
    if isinstance(instruction, SpaceToDepth):
        return SpaceToDepth(not instruction.inverse)
    if isinstance(instruction, SplitOff):
        return Join()
    if isinstance(instruction, Join):
        return SplitOff()
    return instruction


def output_channels(instructions: Iterable[object], channels: int) -> int:
    """The number of channels after these instructions (data -> latent); `channels` before them."""
    for instruction in instructions:
        if isinstance(instruction, SpaceToDepth):
            channels *= 4
        elif isinstance(instruction, SplitOff):
            channels //= 2
    return channels


def run_network(net: nn.Module, x: Tensor, net_input: Tensor, context: Sequence[Tensor]) -> Any:
    """Run a coupling network; x is the state before the coupling."""
    return net(net_input, *context)


class Executed(NamedTuple):
    """The result of a program."""

    x: Tensor  # the state
    latents: tuple[Tensor, ...]  # in the order in which they were split off
    ledger: Tensor  # (N, T), terms of the log-determinant of each sample


def execute(
    instructions: Sequence[Instruction],
    x: Tensor,
    latents: Sequence[Tensor],
    folded: Mapping[int, FoldedWeights],
    context: Sequence[Tensor] = (),
    run: Callable[[nn.Module, Tensor, Tensor, Sequence[Tensor]], Any] = run_network,
) -> Executed:
    """Run instructions, with one launch for each coupling and the channel-linear map after it.

    Args:
        instructions: the program, whose groups of linear maps are folded already.
        x: state (N, C, *spatial).
        latents: the latents that `Join` appends, taken from the end.
        folded: the weights of each group that `ChannelLinear` instructions name.
        context: further inputs of every network.
        run: runs the networks, and may record data for a backward pass.
    """
    cut, split_off, linear, couple, couple_linear = _operators()
    waiting, removed, ledgers = list(latents), [], []
    rows: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def weights_of(instruction: ChannelLinear) -> tuple[Tensor, Tensor]:
        group = instruction.group
        if group not in rows:
            check_device("weight", folded[group].weight, x)
            # `unbind` makes one gradient of the group; indexing would make and add one per row.
            weight, bias = spread(folded[group].weight, folded[group].bias, x)
            rows[group] = list(zip(unbind_weights(weight), bias.unbind(), strict=True))
        return rows[group][instruction.row]

    net_input = None  # input of the next network, if the last launch has written it
    i = 0
    while i < len(instructions):
        instruction, i = instructions[i], i + 1
        if isinstance(instruction, ChannelLinear):
            x, net_input = linear(
                x, *weights_of(instruction), PRECISION, _net_input_dtype(instructions, i, x)
            )
        elif isinstance(instruction, Couple):
            if net_input is None:
                net_input = cut(x, autocast_dtype(x))
            params = run(instruction.net, x, net_input, context)
            params = check_params(x, params, "net's output")
            scale, inverse = instruction.scale.args, instruction.inverse
            following = instructions[i] if i < len(instructions) else None
            if isinstance(following, ChannelLinear):
                i += 1
                dtype = _net_input_dtype(instructions, i, x)
                x, net_input, ledger = couple_linear(
                    x, params, *weights_of(following), PRECISION, dtype, *scale, inverse
                )
            else:
                x, ledger = couple(x, params, *scale, inverse)
                net_input = None
            ledgers.append(ledger)
        else:
            net_input = None
            if isinstance(instruction, SpaceToDepth):
                x = instruction(x)
            elif isinstance(instruction, SplitOff):
                x, latent = split_off(x)
                removed.append(latent)
            else:
                x = torch.cat([x, waiting.pop()], dim=1)
    if not ledgers:
        ledgers.append(x.new_zeros((x.shape[0], 1), dtype=accumulator(x.dtype)))
    return Executed(x, tuple(removed), torch.cat(ledgers, dim=1))


def _operators() -> tuple[Any, Any, Any, Any, Any]:
    """The functions that cut the network input, split off a latent, and apply the 1x1 convolution,
    the coupling, and both in one launch.

    Compilers get the registered operators, autograd gets autograd functions, and everything else
    gets the plain functions, which have the least overhead.
    """
    if torch.compiler.is_compiling() and not transformed():
        return cut_net_input, _split_off, conv1x1_op, affine_coupling_op, coupling_conv1x1_op
    if torch.is_grad_enabled() and not transformed():
        return _cut_eager, _split_off_eager, conv1x1_eager, coupling_eager, coupling_conv1x1_eager
    return cut_net_input, _split_off, conv1x1_forward, coupling_forward, coupling_conv1x1_forward


def _split_off(x: Tensor) -> tuple[Tensor, Tensor]:
    """A view of the first half of the channels, and a copy of the second."""
    c_a = x.shape[1] // 2
    return x[:, :c_a], x[:, c_a:].clone()


# Autograd's own gradient of a slice is a contiguous state that is zero outside the slice. These
# functions keep the layout of the state.


def _setup_slices(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
    ctx.like = torch.empty_like(inputs[0], device="meta")


def _cut_backward(ctx: Any, dnet: Tensor) -> tuple[Tensor | None, ...]:
    dx = torch.zeros_like(ctx.like, device=dnet.device)
    dx[:, : dnet.shape[1]] = dnet
    return dx, None


def _split_off_backward(ctx: Any, dfirst: Tensor, dlatent: Tensor) -> tuple[Tensor | None, ...]:
    dx = torch.empty_like(ctx.like, device=dfirst.device)
    dx[:, : dfirst.shape[1]] = dfirst
    dx[:, dfirst.shape[1] :] = dlatent
    return (dx,)


_cut_eager = eager_function(cut_net_input, _setup_slices, _cut_backward)
_split_off_eager = eager_function(_split_off, _setup_slices, _split_off_backward)


def keep_layout(state: Tensor) -> None:
    """Convert the gradient of `state` to the memory layout of `state` when it arrives.

    A loss may return a gradient in another layout, which every later launch would read slowly. One
    copy here avoids that. It does nothing under compilers, which choose layouts themselves, and in
    transforms of torch.func.
    """
    if not state.requires_grad or transformed() or torch.compiler.is_compiling():
        return
    like = torch.empty_like(state, device="meta")
    state.register_hook(lambda gradient: None if gradient is None else in_layout_of(like, gradient))


def _net_input_dtype(instructions: Sequence[Instruction], i: int, x: Tensor) -> torch.dtype | None:
    """If instruction i has a network, the dtype of its input, which the launch before it writes."""
    network_next = i < len(instructions) and isinstance(instructions[i], Couple)
    return autocast_dtype(x) if network_next else None
