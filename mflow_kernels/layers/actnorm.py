"""Actnorm: an affine map of each channel, initialized from the first batch."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.layers.bijection import Bijection
from mflow_kernels.layers.folding import ActNormConv
from mflow_kernels.ops.checks import check_count, check_state_for
from mflow_kernels.ops.layouts import pixels
from mflow_kernels.reversible.instructions import Instruction, Layer
from mflow_kernels.reversible.masks import frames, mask_at, with_mask
from mflow_kernels.reversible.steps import Steps


class ActNorm(Bijection):
    """y = exp(log_scale) * (x + bias) for each channel (Glow, arXiv 1807.03039, section 3.1).

    A new layer is the identity. `initialize(x)` sets it once, so that its output on that batch has
    zero mean and unit variance. The buffer `initialized` is saved with the weights, so a loaded
    layer is not set again. `forward` never reads it. A channel that is constant in the batch keeps
    its scale. Under torch.distributed the statistics are those of all ranks' batches; every rank
    must call `initialize`, and all set the same values.

    Args:
        channels: C of the states (N, C, *spatial).
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_count("channels", channels, 1)
        self.channels = channels
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self.was_set = False  # initialized or loaded, known without reading the device

    def instructions(self) -> list[Instruction]:
        return [_ActNormLayer(self)]

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        self._check("x", x)
        warn_if_not_initialized(self)
        return self._run(ops.actnorm, x, context)

    def inverse(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        self._check("z", z)
        return self._run(ops.actnorm_inverse, z, context)

    def _check(self, name: str, x: Tensor) -> None:
        bias = self.bias
        usual = type(x) is Tensor and x.dim() == 4 and x.dtype == bias.dtype
        usual = usual and x.device == bias.device
        if not usual or x.shape[1] != self.channels or 0 in x.shape:
            check_state_for(name, x, self.bias)

    def _run(
        self, operator: Callable[..., Any], x: Tensor, context: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        if not self.masked:
            return operator(x, self.bias, self.log_scale)
        x, (mask, *_) = with_mask(x, context)
        y, logdet = operator(x, self.bias, self.log_scale)
        return y * mask_at(mask, y), logdet * (frames(mask, y) / pixels(y))

    def initialize(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        self.set_from(x, *context)
        return self(x, *context)

    @torch.no_grad()
    def set_from(self, x: Tensor, *context: Tensor) -> None:
        """Set bias and scale from the batch x (N, C, *spatial), unless they have been set.

        If the layer is masked, the first context is the mask, and valid frames alone count.

        Raises:
            TypeError, ValueError: x does not fit, has fewer than two values a channel, or is not
                finite.
        """
        check_state_for("x", x, self.bias)
        if self.initialized:
            return
        samples = x.transpose(0, 1).flatten(1).double()
        if self.masked:
            x, (mask, *_) = with_mask(x, context)
            samples = samples[:, mask_at(mask, x).flatten().bool()]
        # All ranks see the same sums, so they raise together and none waits for another.
        count = over_ranks(samples.new_tensor(samples.shape[1]))
        total = over_ranks(samples.sum(1))
        if count < 2:
            raise ValueError(f"x: expected at least two values a channel, got {tuple(x.shape)}")
        if not total.isfinite().all():
            raise ValueError("x: expected finite values to initialize actnorm from")
        mean = total / count
        std = (over_ranks((samples - mean[:, None]).square().sum(1)) / count).sqrt()
        constant = std <= 1e-6 * (1 + mean.abs())
        self.bias.copy_(-mean)
        self.log_scale.copy_(torch.where(constant, 0.0, -std.log()))
        self.keep_as_set()

    def keep_as_set(self) -> None:
        """Keep bias and scale as they are: `initialize` will not change them."""
        self.initialized.fill_(True)
        self.was_set = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.was_set = True


class _ActNormLayer(Layer):
    """An actnorm, which folds into a 1x1 convolution that follows it."""

    def fused(self, following: Instruction) -> Steps | None:
        if self.inverted or not isinstance(following, Steps) or following.inverted:
            return None
        assert isinstance(self.module, ActNorm)
        if following.masked is not self.module.masked:
            return None
        first, *after = following.steps
        if not isinstance(first.linear, ActNormConv) or first.linear.actnorm is not None:
            return None
        folded = ActNormConv(self.module, first.linear.conv)
        return Steps([first._replace(linear=folded), *after], masked=following.masked)


def warn_if_not_initialized(module: nn.Module) -> None:
    """Warn if training starts with an actnorm in `module` that was never initialized or loaded.

    Only the first call in training mode with gradients checks this.
    """
    if getattr(module, "actnorms_checked", False) or not module.training:
        return
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    module.actnorms_checked = True  # type: ignore[assignment]
    layers = [m for m in module.modules() if isinstance(m, ActNorm) and m.bias.requires_grad]
    if not all(layer.was_set for layer in layers):
        warnings.warn(
            "ActNorm was never initialized and starts as the identity: before training, call "
            "initialize(x) of the model with a first batch",
            stacklevel=3,
        )


def over_ranks(x: Tensor) -> Tensor:
    """The sum of x over all ranks, or x if there is only one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x
