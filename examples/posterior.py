"""Draw from posteriors before and after `accelerate`: python examples/posterior.py"""

import copy
import math
import time

import torch
from nflows import distributions, flows
from nflows import transforms as nt
from sklearn.model_selection import cross_val_score
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from mflow_kernels.interop import accelerate


def two_moons(n: int) -> tuple[Tensor, Tensor]:
    """Return parameters and data of the two moons of sbi's benchmark (arXiv 2101.04653)."""
    theta, angle = 2 * torch.rand(n, 2) - 1, math.pi * (torch.rand(n) - 0.5)
    moon = (0.1 + 0.01 * torch.randn(n)) * torch.stack([angle.cos(), angle.sin()])
    shift = torch.stack([-theta.sum(1).abs(), theta[:, 1] - theta[:, 0]]) / math.sqrt(2)
    return theta, (moon + shift).T + torch.tensor([0.25, 0.0])


def gaussian(n: int) -> tuple[Tensor, Tensor]:
    return (theta := 0.3 * torch.randn(n, 10)), theta + 0.3 * torch.randn(n, 10)


def estimator(theta: Tensor, x: Tensor) -> flows.Flow:
    """Return a flow like that of sbi's `build_maf`: five transforms of two blocks of 50 units."""
    dims, layers = theta.shape[1], [nt.PointwiseAffineTransform(0.0, 1 / theta.std())]
    how = {"num_blocks": 2, "use_residual_blocks": False, "activation": torch.tanh}
    for _ in range(5):
        layers.append(nt.MaskedAffineAutoregressiveTransform(dims, 50, x.shape[1], **how))
        layers.append(nt.RandomPermutation(dims))
    return flows.Flow(nt.CompositeTransform(layers), distributions.StandardNormal([dims]))


for simulate in (two_moons, gaussian):
    torch.manual_seed(0)
    theta, x = simulate(2000)
    models = [plain := estimator(theta, x), copy.deepcopy(plain)]
    accelerate(models[1])
    draws, times = [], []
    for model in models:
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for batch in torch.arange(2000).split(200) * 30:
            optimizer.zero_grad()
            (-model.log_prob(theta[batch], x[batch]).mean()).backward()
            optimizer.step()
        start = time.process_time()
        with torch.no_grad():
            draws.append(model.sample(1000, x[:1])[0])
        times.append(1e3 * (time.process_time() - start))
    # A classifier that cannot tell two sets of samples apart is right in half of the cases.
    judge = MLPClassifier((32, 32), max_iter=100, random_state=0)
    c2st = cross_val_score(judge, torch.cat(draws), [0] * 1000 + [1] * 1000, cv=2).mean()
    print(f"{simulate.__name__}: {times[0]:.0f} ms, accelerated {times[1]:.0f} ms, C2ST {c2st:.3f}")
