"""Affine coupling, and the split that factors out half of the channels with one."""

from torch import Tensor, nn

from mflow_kernels.layers.bijection import Instructed
from mflow_kernels.layers.networks import check_takes, coupling_net
from mflow_kernels.ops.checks import (
    check_channels,
    check_count,
    check_device,
    check_shape,
    check_state,
    check_tensor,
)
from mflow_kernels.ops.layouts import flow_state
from mflow_kernels.ops.scale import Kind, ScaleFunction
from mflow_kernels.reversible.couples import AdditiveCouple, AffineCouple, Couple
from mflow_kernels.reversible.instructions import Instruction, SplitOff
from mflow_kernels.reversible.steps import Step, Steps


class Coupling(Instructed):
    """A coupling by a network, which is the caller's or `coupling_net`.

    Args:
        numbers: how many numbers of the network's output each element of x_b takes.
        others: as for `AffineCoupling`.
    """

    def __init__(
        self,
        channels: int,
        net: nn.Module | None,
        numbers: int,
        width: int,
        spatial_dims: int,
        context_channels: int,
    ) -> None:
        super().__init__()
        check_count("channels", channels, 2)
        self.channels: int = channels
        if net is None:
            c_a = channels // 2
            params = numbers * (channels - c_a)
            net = coupling_net(c_a, params, width, spatial_dims, context_channels)
        elif not isinstance(net, nn.Module):
            raise TypeError(f"net: expected a torch.nn.Module, got {type(net).__name__}")
        self.net = net

    def couple(self) -> Couple:
        """The coupling that the layer's instructions run."""
        raise NotImplementedError

    def instructions(self) -> list[Instruction]:
        return [Steps([Step(None, self.couple())], masked=self.masked)]

    def checked(self, name: str, value: object) -> Tensor:
        x = flow_state(name, value)
        check_takes(self.net, name, x, self.channels)
        return x


class AffineCoupling(Coupling):
    """y_a = x_a, y_b = s * (x_b + shift) with (raw, shift) = net(x_a) (RealNVP, arXiv 1605.08803).

    x_a is the first half of the channels (the smaller one if C is odd), and x_b is the rest.

    Args:
        channels: C >= 2 of the states (N, C, *spatial).
        net: any module from x_a (N, C // 2, *spatial) to params (N, 2 * (C - C // 2), *spatial),
            raw scales first. Extra arguments of `layer(x, *context)` are passed to it. By default
            `coupling_net` of the given width. A net with dropout draws another mask in each call:
            in training mode the layer is then no bijection, and `inverse(forward(x))` is not x.
        width: hidden channels of the default net.
        scale: the scale function, or the name of one with its defaults. The default, "tanh", keeps
            |log s| < 1; `ScaleFunction` says why. None makes an additive coupling, s = 1 (NICE,
            arXiv 1410.8516; VITS calls it mean-only): net returns the shift alone.
        spatial_dims: 0 to 3, the number of spatial axes of the default net.
        context_channels: K. If positive, the default net takes a context (N, K) or (N, K, *sides);
            see `CouplingNetwork`.

    Raises:
        TypeError, ValueError: naming the argument. A call checks the channels of the state before
            any kernel runs. If the net starts with a convolution or linear layer of torch, it also
            checks the state's axes, device and (outside autocast) dtype. It checks the net's output
            too.
    """

    def __init__(
        self,
        channels: int,
        net: nn.Module | None = None,
        *,
        width: int = 64,
        scale: ScaleFunction | Kind | None = "tanh",
        spatial_dims: int = 2,
        context_channels: int = 0,
    ) -> None:
        numbers = 1 if scale is None else 2
        super().__init__(channels, net, numbers, width, spatial_dims, context_channels)
        self.scale = None if scale is None else ScaleFunction.of(scale)

    def couple(self) -> AffineCouple:
        if self.scale is None:
            return AdditiveCouple(self.net)
        return AffineCouple(self.net, self.scale)


class Split(Instructed):
    """Factor out channels as a latent; by default half of them, after an affine coupling.

    `z = (kept, latent)`. The coupling is Glow's learned prior N(mean(x_a), sd(x_a)) of the half
    x_b, so every latent is standard normal and every round trip is exact.

    Args:
        kept: number of channels that remain after the split, the first ones; by default C // 2.
        prior: whether to apply the coupling. Without it, the other arguments of `AffineCoupling`
            are not used.
        others: as for `AffineCoupling`.
    """

    def __init__(
        self,
        channels: int,
        net: nn.Module | None = None,
        *,
        kept: int | None = None,
        prior: bool = True,
        width: int = 64,
        scale: ScaleFunction | Kind | None = "tanh",
        spatial_dims: int = 2,
        context_channels: int = 0,
    ) -> None:
        super().__init__()
        check_count("channels", channels, 2)
        self.channels: int = channels
        self.kept = channels // 2 if kept is None else kept
        check_count("kept", self.kept, 1, channels - 1)
        self.coupling = (
            AffineCoupling(
                channels,
                net,
                width=width,
                scale=scale,
                spatial_dims=spatial_dims,
                context_channels=context_channels,
            )
            if prior
            else None
        )

    def instructions(self) -> list[Instruction]:
        before = [] if self.coupling is None else self.coupling.instructions()
        return [*before, SplitOff(self.kept)]

    def checked(self, name: str, value: object) -> Tensor:
        if self.coupling is None:
            return super().checked(name, value)
        return self.coupling.checked(name, value)

    def inverse(self, z: tuple[Tensor, Tensor], *context: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(z, tuple) or len(z) != 2:
            actual = f"{len(z)} of them" if isinstance(z, tuple) else type(z).__name__
            raise TypeError(f"z: expected a tuple (kept, latent), got {actual}")
        kept = check_state("z[0]", z[0])
        if self.coupling is None:
            check_channels("z[0]", kept, self.kept)
        else:
            check_takes(self.coupling.net, "z[0]", kept, self.kept)
        check_latent("z[1]", z[1], kept, self.channels - self.kept, tuple(kept.shape[2:]))
        x, _, logdet = self._run(kept, z[1:], context, inverse=True)
        return x, logdet


def check_latent(
    name: str, value: object, like: Tensor, channels: int, sides: tuple[int, ...]
) -> None:
    """Raise TypeError or ValueError unless `value` is a latent of shape (N, channels, *sides).

    `like` is another state of the same batch, with the same dtype and device.
    """
    latent = check_tensor(name, value, (like.dtype,))
    check_shape(name, latent, (like.shape[0], channels, *sides))
    check_device(name, latent, like)
