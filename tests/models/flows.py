"""Small flows for the tests of models."""

import itertools
from collections.abc import Callable

import torch
from cases import perturbed
from torch import Tensor, nn

from mflow_kernels import Glow, HierarchicalFlow, ManifoldFlow, ManifoldObjective, VectorFlow


def image_flow(
    objective: ManifoldObjective | None = None, dim: int = 5, width: int = 4
) -> ManifoldFlow:
    """A flow on images (1, 4, 4) in float64. Its latents are (2, 2, 2) and (8, 1, 1)."""
    glow = perturbed(Glow((1, 4, 4), 2, 1, width))
    return ManifoldFlow(glow, dim, objective=objective).double()


def hierarchy(*dims: int) -> HierarchicalFlow:
    """An image flow with the first dimension, then vector flows with the others, in float64."""
    flows = [image_flow(dim=dims[0])]
    for before, after in itertools.pairwise(dims):
        flows.append(ManifoldFlow(perturbed(VectorFlow(before, 2, 4)), after).double())
    return HierarchicalFlow(flows)


class Scale(nn.Module):
    """z = x / deviation in plain torch, the flow that normalizes independent normal numbers."""

    def __init__(self, deviation: list[float]) -> None:
        super().__init__()
        self.deviation = nn.Parameter(torch.tensor(deviation, dtype=torch.float64))
        self.input_shape = tuple(self.deviation.shape)
        self.latent_shapes = (self.input_shape,)

    def forward(self, x: Tensor) -> tuple[tuple[Tensor], Tensor]:
        return (x / self.deviation,), -self.deviation.log().sum().expand(len(x))

    def inverse(self, z: tuple[Tensor]) -> tuple[Tensor, Tensor]:
        return z[0] * self.deviation, self.deviation.log().sum().expand(len(z[0]))


def assert_gradient_is_a_difference(
    value: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor
) -> None:
    """Assert that the gradients of value(x) by x and each parameter agree with differences of its
    values along random directions."""
    # The error of a difference is eps^2, plus the rounding of the values divided by eps.
    how = {"eps": 1e-5, "atol": 1e-6, "rtol": 1e-6, "fast_mode": True}
    leaves = (x.requires_grad_(), *model.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: value(x), leaves, **how)


def jacobians(decode: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """Return J (N, D, d) by reverse mode."""
    of_all = torch.autograd.functional.jacobian(lambda u: decode(u).flatten(1).sum(0), u)
    return of_all.transpose(0, 1)
