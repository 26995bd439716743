"""Shapes and weights of the penalty, on noisy points of the sphere with one flow."""

import itertools
from functools import partial
from typing import Literal

import torch

from benchmarks.manifold import methods, points, training
from benchmarks.manifold.comparison import about_runs
from benchmarks.manifold.output import Row, Store, markdown
from benchmarks.manifold.targets import TARGETS
from mflow_kernels import ManifoldObjective, VectorFlow
from mflow_kernels.models.objectives import Rho
from mflow_kernels.models.penalty_weight import Domain

TARGET = TARGETS["sphere"]
DOMAINS: tuple[Domain, ...] = ("latent", "data")
RHOS: tuple[Rho, ...] = ("l2", "l1", "huber")
WEIGHTS: tuple[float | Literal["variance"], ...] = (10.0, 100.0, 1000.0, "variance")
HUBER_DELTA = 0.1  # twice the standard deviation of the noise
STEPS, RATE = 400, 3e-3


def run(store: Store, quick: bool) -> None:
    """Make the runs."""
    seeds, rhos, weights, steps = range(3), RHOS, WEIGHTS, STEPS
    if quick:
        seeds, rhos, weights, steps = range(1), RHOS[:1], WEIGHTS[::2], 100
    for seed, domain, rho, weight in itertools.product(seeds, DOMAINS, rhos, weights):
        if weight == "variance" and domain == "latent":
            continue  # the loss would have no minimum
        key = f"penalties-{domain}-{rho}-weight{weight}-seed{seed}"
        store.row(key, partial(train, domain, rho, weight, seed, steps))


def report(store: Store) -> dict[str, str]:
    """Return the table of the runs, by name."""
    rows = store.rows("penalties-")
    keys = {"domain": "domain", "rho": "rho", "weight": "w"}
    rows.sort(key=lambda row: (row["domain"], row["rho"], WEIGHTS.index(row["weight"])))
    return {"penalties": markdown(rows, keys, points.METRICS) + "\n" + about_runs(rows)}


def train(
    domain: Domain, rho: Rho, weight: float | Literal["variance"], seed: int, steps: int
) -> Row:
    """Train and measure one flow with one penalty."""
    torch.manual_seed(seed)  # for the weights
    flow = VectorFlow(3, points.STEPS, points.WIDTH)
    objective = ManifoldObjective(domain, rho, weight=weight, delta=HUBER_DELTA)
    method = methods.one_stage(flow, TARGET.dim, objective)
    data = points.batches(TARGET, torch.Generator().manual_seed(seed))
    seconds = training.train(method, data, [steps], RATE)
    about: Row = {"domain": domain, "rho": rho, "weight": weight, "seed": seed}
    return about | {"seconds": seconds} | points.measure(method, TARGET)
