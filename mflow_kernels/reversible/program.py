"""What a run of flow layers does to a state, move by move, in either direction.

Layers say what they do as a list of moves; `run` walks the list with as few launches as there are
(a coupling and the 1x1 convolution after it are one), and `layers.reversible` walks it back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mflow_kernels.ops.checks import check_device
from mflow_kernels.ops.conv1x1 import (
    conv1x1_eager,
    conv1x1_forward,
    conv1x1_op,
    spread,
)
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
from mflow_kernels.ops.launch import (
    accumulator,
    autocasts,
    cut_net_input,
    in_layout_of,
    is_channels_last,
    transformed,
)
from mflow_kernels.ops.registration import eager_function
from mflow_kernels.ops.scale import ScaleFunction

PRECISION = "tf32x3"


class Mix(NamedTuple):
    """x -> W x + bias, with the weight and bias in row `row` of the mixes' entry `group`."""

    group: int
    row: int


class Couple(NamedTuple):
    """The affine coupling with this network, or its inverse."""

    net: nn.Module
    scale: ScaleFunction
    inverse: bool


@dataclass(frozen=True, eq=False)  # torch 2.9 traces no call of a NamedTuple, nor a hash
class Squeezing:
    """(C, H, W) -> (4C, H/2, W/2), or back where `inverse`, as `F.pixel_unshuffle` orders the
    channels.

    One copy, which keeps the layout, and so does its gradient. `F.pixel_unshuffle` keeps
    channels_last on a CPU only: on CUDA it returns contiguous tensors.
    """

    inverse: bool

    def __call__(self, x: Tensor) -> Tensor:
        if self.inverse and (x.dim() != 4 or x.shape[1] % 4):
            raise ValueError(f"z: expected (N, 4C, H, W), got {tuple(x.shape)}")
        if not self.inverse and (x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2):
            raise ValueError(f"x: expected (N, C, H, W) with even H and W, got {tuple(x.shape)}")
        if not len(x):  # torch returns an empty batch as it came
            n, c, h, w = x.shape
            return x.reshape(
                (n, c // 4, 2 * h, 2 * w) if self.inverse else (n, 4 * c, h // 2, w // 2)
            )
        if transformed() or not is_channels_last(x):
            return F.pixel_shuffle(x, 2) if self.inverse else F.pixel_unshuffle(x, 2)
        return _SqueezeChannelsLast.apply(x, self.inverse)


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
        return Squeezing(not ctx.inverse)(dz), None


class Leave(NamedTuple):
    """The second half of the channels leaves as a latent."""


class Return(NamedTuple):
    """The latent that left last comes back as the second half."""


Move = Mix | Couple | Squeezing | Leave | Return


class Mixes(NamedTuple):
    """Folded 1x1 convolutions of K steps of one width."""

    weight: Tensor  # (K, C, C)
    bias: Tensor  # (K, C)
    log_det: Tensor  # the sum of log |det weight| over the steps, for one pixel


class Watch(Protocol):
    """Runs the networks of a walk that will be walked back."""

    def run(self, net: nn.Module, x: Tensor, net_input: Tensor, context: Sequence[Tensor]) -> Any:
        """net(net_input, *context), where the state is x."""


class Ran(NamedTuple):
    """The state at the end, the latents that left, finest first, and the ledger (N, T)."""

    x: Tensor
    latents: tuple[Tensor, ...]
    ledger: Tensor


def run(
    moves: Sequence[Move],
    x: Tensor,
    latents: Sequence[Tensor],
    mixes: Mapping[int, Mixes],
    context: Sequence[Tensor] = (),
    watch: Watch | None = None,
) -> Ran:
    """Walk the moves: one launch for each coupling with the mix that follows it.

    Args:
        moves: what to do.
        x: state (N, C, *spatial).
        latents: what `Return` brings back, the last one first.
        mixes: the weights that the `Mix` moves name.
        context: further inputs of every network.
        watch: runs the networks.
    """
    cut, leave, conv1x1, coupling, coupling_conv1x1 = _operators()
    waiting, left, ledgers = list(latents), [], []
    ready: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def mix_of(move: Mix) -> tuple[Tensor, Tensor]:
        if move.group not in ready:
            check_device("weight", mixes[move.group].weight, x)
            # Unbound at once: gradients of rows would each be added to one of the whole group.
            weight, bias = spread(mixes[move.group].weight, mixes[move.group].bias, x)
            ready[move.group] = list(zip(weight.unbind(), bias.unbind(), strict=True))
        return ready[move.group][move.row]

    net = None  # the next network's input, where a launch has written it
    i = 0
    while i < len(moves):
        move, i = moves[i], i + 1
        if isinstance(move, Mix):
            dtype = _feeds(moves, i, x)
            x, net = conv1x1(x, *mix_of(move), PRECISION, dtype)
        elif isinstance(move, Couple):
            if net is None:
                net = cut(x, network_dtype(x))
            if watch is None:
                params = check_params(x, move.net(net, *context))
            else:
                params = check_params(x, watch.run(move.net, x, net, context))
            mix = moves[i] if i < len(moves) else None
            if isinstance(mix, Mix):
                i += 1
                dtype = _feeds(moves, i, x)
                x, net, ledger = coupling_conv1x1(
                    x, params, *mix_of(mix), PRECISION, dtype, *move.scale.args, move.inverse
                )
            else:
                x, ledger = coupling(x, params, *move.scale.args, move.inverse)
                dtype = None
            ledgers.append(ledger)
        else:
            dtype = None
            if isinstance(move, Squeezing):
                x = move(x)
            elif isinstance(move, Leave):
                x, latent = leave(x)
                left.append(latent)
            else:
                x = torch.cat([x, waiting.pop()], dim=1)
        if dtype is None:
            net = None
    if not ledgers:
        ledgers.append(x.new_zeros((x.shape[0], 1), dtype=accumulator(x.dtype)))
    return Ran(x, tuple(left), torch.cat(ledgers, dim=1))


def _operators() -> tuple[Any, Any, Any, Any, Any]:
    """The cut of a network input, the leaving of a latent, conv1x1, coupling and the fused step, in
    the form that costs the host least: registered for compilers, autograd functions for autograd,
    and plain ones."""
    if torch.compiler.is_compiling() and not transformed():
        return cut_net_input, _leave, conv1x1_op, affine_coupling_op, coupling_conv1x1_op
    if torch.is_grad_enabled() and not transformed():
        return _cut_eager, _leave_eager, conv1x1_eager, coupling_eager, coupling_conv1x1_eager
    return cut_net_input, _leave, conv1x1_forward, coupling_forward, coupling_conv1x1_forward


def _leave(x: Tensor) -> tuple[Tensor, Tensor]:
    """The half that stays, a view, and the half that leaves, a copy."""
    c_a = x.shape[1] // 2
    return x[:, :c_a], x[:, c_a:].clone()


# Of slices, autograd would make contiguous gradients, each a whole state with zeros in it.


def _setup_slices(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
    ctx.like = torch.empty_like(inputs[0], device="meta")


def _cut_backward(ctx: Any, dnet: Tensor) -> tuple[Tensor | None, ...]:
    dx = torch.zeros_like(ctx.like, device=dnet.device)
    dx[:, : dnet.shape[1]] = dnet
    return dx, None


def _leave_backward(ctx: Any, dkept: Tensor, dlatent: Tensor) -> tuple[Tensor | None, ...]:
    dx = torch.empty_like(ctx.like, device=dkept.device)
    dx[:, : dkept.shape[1]] = dkept
    dx[:, dkept.shape[1] :] = dlatent
    return (dx,)


_cut_eager = eager_function(cut_net_input, _setup_slices, _cut_backward)
_leave_eager = eager_function(_leave, _setup_slices, _leave_backward)


def keep_layout(state: Tensor) -> None:
    """Let the gradient of `state` have its layout: a gradient of another one, as a loss may hand
    over, is copied once where it comes in, and not read in the wrong order by every launch after.

    Not for compilers, which choose layouts themselves, nor for transforms."""
    if not state.requires_grad or transformed() or torch.compiler.is_compiling():
        return
    like = torch.empty_like(state, device="meta")
    state.register_hook(lambda gradient: None if gradient is None else in_layout_of(like, gradient))


def _feeds(moves: Sequence[Move], i: int, x: Tensor) -> torch.dtype | None:
    """The dtype of the network input that a launch just before move i writes, if it does."""
    return network_dtype(x) if i < len(moves) and isinstance(moves[i], Couple) else None


def network_dtype(x: Tensor) -> torch.dtype:
    """What a coupling network computes in: autocast's dtype where it is on, else the state's."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else x.dtype
