import math

import pytest
import torch
from cases import normal, perturbed

from mflow_kernels import (
    Glow,
    ManifoldFlow,
    ManifoldObjective,
    estimate_intrinsic_dimension,
    latent_importance,
    manifold_mask_from_data,
)
from mflow_kernels.testing import assert_close
from models.flows import Scale

DEVIATIONS = [0.01, 2.0, 0.02, 1.0, 0.015]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("deviations", "dimension", "gap"), [(DEVIATIONS, 2, 50), ([1.0, 1.5, 0.8], 3, 1.5)]
)
def test_the_spectrum_of_a_linear_flow_is_known(deviations, dimension, gap):
    """If no two neighbours differ by a factor of 2, all dimensions count."""
    flow = Scale(deviations)
    x = normal(7, len(deviations), dtype=torch.float64) * flow.deviation.detach()
    estimate = estimate_intrinsic_dimension(flow, x)
    assert estimate.dimension == dimension
    assert estimate.gap == pytest.approx(gap)
    expected = torch.tensor(deviations, dtype=torch.float64).sort(descending=True).values
    assert_close(estimate.spectrum, expected, terms=100)


def test_the_spectrum_of_a_manifold_flow_does_not_depend_on_sigma():
    """The flow maps data off the manifold to N(0, sigma^2), so that it stretches v more."""
    mask = (torch.tensor([False, True, False, True, False]),)
    stretched = [d if on else d / 0.1 for d, on in zip(DEVIATIONS, mask[0], strict=True)]
    objective = ManifoldObjective("data", sigma=0.1)
    model = ManifoldFlow(Scale(stretched), mask=mask, objective=objective)
    x = normal(7, 5, dtype=torch.float64) * torch.tensor(DEVIATIONS, dtype=torch.float64)
    estimate = estimate_intrinsic_dimension(model, x)
    expected = torch.tensor([2.0, 1.0, 0.02, 0.015, 0.01], dtype=torch.float64)
    assert_close(estimate.spectrum, expected, terms=100)
    assert estimate.dimension == 2
    model = ManifoldFlow(Scale(DEVIATIONS), 2, objective=ManifoldObjective("latent"))
    with pytest.raises(ValueError, match="flow: expected a penalty in the data domain"):
        estimate_intrinsic_dimension(model, x)


def test_the_spectrum_agrees_with_autograds_jacobians():
    flow = perturbed(Glow((1, 4, 4), 2, 1, 4), 0.2).double()
    x = normal(3, 1, 4, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: torch.cat([z.flatten(1) for z in flow(x)[0]], 1), x
    )
    jacobian = jacobian.reshape(3, 16, 3, 16)
    singular = torch.stack([torch.linalg.svdvals(jacobian[i, :, i]) for i in range(3)])
    expected = (1 / singular).flip(1).log().mean(0).exp()
    assert_close(estimate_intrinsic_dimension(flow, x).spectrum, expected, terms=10_000)


def test_importance_is_the_change_of_the_reconstruction():
    """In this linear flow, setting z_i to 0 changes x by z_i deviation_i = x_i."""
    flow = Scale(DEVIATIONS)
    x = normal(400, 5, dtype=torch.float64) * flow.deviation.detach()
    # Use another seed than x did; otherwise the probes would repeat its numbers.
    (got,) = latent_importance(flow, x, probes=16, generator=seeded(1))
    (again,) = latent_importance(flow, x, probes=16, generator=seeded(1))
    assert torch.equal(got, again)
    expected = x.square().mean(0)
    # Five times the standard error in the docstring.
    assert ((got / expected - 1).abs() < 5 * math.sqrt(6 / (400 * 16))).all()


def test_masks_of_images_reconstruct_better_than_the_default():
    """For images made of fine pixels, the default (the coarsest latents) is a bad choice."""
    flow = Glow((1, 4, 4), 2, 1, 4).double()
    x = 0.1 * normal(64, 1, 4, 4, dtype=torch.float64)
    x[:, :, ::2] += normal(64, 1, 2, 4, dtype=torch.float64)
    masks = manifold_mask_from_data(flow, x, 6, generator=seeded(1))
    assert [tuple(mask.shape) for mask in masks] == [(2, 2, 2), (8, 1, 1)]
    assert sum(int(mask.sum()) for mask in masks) == 6
    importance = latent_importance(flow, x, generator=seeded(1))
    on = torch.cat([i[m] for i, m in zip(importance, masks, strict=True)])
    off = torch.cat([i[~m] for i, m in zip(importance, masks, strict=True)])
    assert on.min() > off.max()
    chosen, default = ManifoldFlow(flow, mask=masks), ManifoldFlow(flow, 6)
    assert chosen.distance(x).mean() < default.distance(x).mean()


def test_ties_go_to_the_later_pixel():
    flow = Scale([1.0, 1.0, 1.0])
    (mask,) = manifold_mask_from_data(flow, torch.zeros(2, 3, dtype=torch.float64), 2)
    assert mask.tolist() == [False, True, True]
