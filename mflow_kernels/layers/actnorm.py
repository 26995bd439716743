"""Actnorm: an affine map of each channel, set from the first batch."""

import torch
from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.ops.checks import check_count, check_state_for


class ActNorm(Bijection):
    """y = exp(log_scale) * (x + bias) for each channel (Glow, arXiv 1807.03039, section 3.1).

    A new layer is the identity. `initialize(x)` makes its output zero mean and unit variance on
    that batch, once: the buffer `initialized` is saved with the weights, so that a loaded layer is
    never set again. `forward` looks at no flag. A channel that is constant in the batch keeps its
    scale. Where torch.distributed runs, the batch is that of all ranks together, and all set the
    same values; every rank must take part.

    Args:
        channels: C of the states (N, C, *spatial).
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_count("channels", channels, 1)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        check_state_for("x", x, self.bias)
        return ops.actnorm(x, self.bias, self.log_scale)

    def inverse(self, z: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        check_state_for("z", z, self.bias)
        return ops.actnorm_inverse(z, self.bias, self.log_scale)

    def initialize(self, x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        self.set_from(x)
        return self(x)

    @torch.no_grad()
    def set_from(self, x: Tensor) -> None:
        """Take bias and scale from the batch x (N, C, *spatial), unless they were set before."""
        check_state_for("x", x, self.bias)
        if self.initialized:
            return
        samples = x.transpose(0, 1).flatten(1).double()
        # Ranks raise together, since all see the same sums: none is left waiting for another.
        count, total = (
            over_ranks(samples.new_tensor(samples.shape[1])),
            over_ranks(samples.sum(1)),
        )
        if count < 2:
            raise ValueError(f"x: expected at least two values a channel, got {tuple(x.shape)}")
        if not total.isfinite().all():
            raise ValueError("x: expected finite values to initialize actnorm from")
        mean = total / count
        std = (over_ranks((samples - mean[:, None]).square().sum(1)) / count).sqrt()
        constant = std <= 1e-6 * (1 + mean.abs())
        self.bias.copy_(-mean)
        self.log_scale.copy_(torch.where(constant, 0.0, -std.log()))
        self.initialized.fill_(True)


def over_ranks(x: Tensor) -> Tensor:
    """The sum of x over all ranks, or x where there is but one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x
