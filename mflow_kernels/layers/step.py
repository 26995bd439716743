"""A step of flow, and chains of them in which one launch serves two neighbours."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.layers.actnorm import ActNorm
from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.layers.conv1x1 import InvertibleConv1x1, plu
from mflow_kernels.layers.coupling import AffineCoupling
from mflow_kernels.ops._launch import accumulator, flow_state, pixels
from mflow_kernels.ops.conv1x1 import conv1x1_op, inverse_mix, spread
from mflow_kernels.ops.coupling import affine_coupling_op, check_params
from mflow_kernels.ops.coupling_conv1x1 import coupling_conv1x1_op
from mflow_kernels.ops.scale import Kind, ScaleFunction


class FlowStep(Bijection):
    """Actnorm, invertible 1x1 convolution, affine coupling (Glow, arXiv 1807.03039, figure 2).

    Actnorm folds into the convolution: a step costs one launch for both and one for the coupling;
    in a `Chain` the coupling shares its launch with the next step's convolution.

    Args: as `AffineCoupling`.
    """

    def __init__(
        self,
        channels: int,
        net: nn.Module | None = None,
        *,
        width: int = 64,
        scale: ScaleFunction | Kind = "tanh",
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.conv = InvertibleConv1x1(channels)
        self.coupling = AffineCoupling(
            channels, net, width=width, scale=scale, spatial_dims=spatial_dims
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _forward([self], x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return _inverse([self], z)

    def initialize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.actnorm.set_from(x)
        return self(x)


class Chain(Bijection):
    """Steps of flow of equal width, one after the other: K steps cost K + 1 launches.

    The coupling of each step and the (folded) 1x1 convolution of the next are one pass over the
    state.

    Args:
        steps: at least one `FlowStep`, all of the same number of channels.
    """

    def __init__(self, steps: Sequence[FlowStep]) -> None:
        super().__init__()
        widths = {step.actnorm.bias.shape[0] for step in steps}
        if len(widths) != 1:
            raise ValueError(
                f"steps: expected at least one step, all of equal channels, got {sorted(widths)}"
            )
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _forward(list(self.steps), x)  # type: ignore[arg-type]

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return _inverse(list(self.steps), z)  # type: ignore[arg-type]

    def initialize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = x
        for step in self.steps:
            z, _ = step.initialize(z)  # type: ignore[operator]
        return self(x)


class Mix(NamedTuple):
    """The folded 1x1 convolutions of K steps."""

    weight: Tensor  # (K, C, C) W diag(exp(log_scale))
    bias: Tensor  # (K, C) weight @ actnorm's bias
    logdet: Tensor  # () sum over steps of log |det weight|, for one pixel


def fold(steps: Sequence[FlowStep], dtype: torch.dtype) -> Mix:
    """Fold each step's actnorm into its convolution, all steps in one batched product."""

    def stack(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors).to(dtype)

    log_diagonal = stack([step.conv.log_diagonal for step in steps])
    log_scale = stack([step.actnorm.log_scale for step in steps])
    weight = plu(
        stack([step.conv.permutation for step in steps]),
        stack([step.conv.lower for step in steps]),
        stack([step.conv.upper for step in steps]),
        stack([step.conv.sign for step in steps]),
        log_diagonal,
    )
    weight = weight * log_scale.exp()[:, None, :]
    bias = stack([step.actnorm.bias for step in steps])
    bias = (weight * bias[:, None, :]).sum(2)
    return Mix(weight, bias, log_diagonal.sum() + log_scale.sum())


PRECISION = "tf32x3"


def _forward(steps: list[FlowStep], x: Tensor) -> tuple[Tensor, Tensor]:
    x = flow_state("x", x)
    mix = fold(steps, accumulator(x.dtype))
    weight, bias = spread(mix.weight, mix.bias, x)
    dtype = network_dtype(x)
    x, net = conv1x1_op(x, weight[0], bias[0], PRECISION, dtype)
    ledgers = []
    for k, step in enumerate(steps):
        params, scale = check_params(x, step.coupling.net(net)), step.coupling.scale.args
        if k + 1 < len(steps):
            x, net, ledger = coupling_conv1x1_op(
                x, params, weight[k + 1], bias[k + 1], PRECISION, dtype, *scale, False
            )
        else:
            x, ledger = affine_coupling_op(x, params, *scale, False)
        ledgers.append(ledger)
    return x, ops.accumulate_logdet(torch.cat(ledgers, dim=1), pixels(x) * mix.logdet)


def _inverse(steps: list[FlowStep], z: Tensor) -> tuple[Tensor, Tensor]:
    z = flow_state("z", z)
    mix = fold(steps, accumulator(z.dtype))
    weight, bias = spread(*inverse_mix(mix.weight, mix.bias), z)
    dtype = network_dtype(z)
    net = z[:, : z.shape[1] // 2].to(dtype)
    ledgers = []
    for k, step in reversed(list(enumerate(steps))):
        params, scale = check_params(z, step.coupling.net(net)), step.coupling.scale.args
        z, net, ledger = coupling_conv1x1_op(
            z, params, weight[k], bias[k], PRECISION, dtype if k else None, *scale, True
        )
        ledgers.append(ledger)
    return z, ops.accumulate_logdet(torch.cat(ledgers, dim=1), -pixels(z) * mix.logdet)


def network_dtype(x: Tensor) -> torch.dtype:
    """What a coupling network computes in: autocast's dtype where it is on, else the state's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
