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
    """Assert that the gradient of sum value(x) by x and the parameters agrees with the difference
    of its values along a random direction."""
    leaves = [x.requires_grad_(), *model.parameters()]
    direction = [torch.randn_like(leaf) for leaf in leaves]
    gradients = torch.autograd.grad(value(x).sum(), leaves)
    along = sum((g * v).sum() for g, v in zip(gradients, direction, strict=True))
    step = 1e-5

    def moved(by: float) -> Tensor:
        for leaf, v in zip(leaves, direction, strict=True):
            leaf += by * v
        return value(x).sum()

    with torch.no_grad():
        expected = (moved(step) - moved(-2 * step)) / (2 * step)
    # The error of the difference is step^2, plus the rounding of the values divided by the step.
    assert (along - expected).abs() < 1e-6 * max(1.0, expected.abs().item())
