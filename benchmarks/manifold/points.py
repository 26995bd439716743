"""Points on curves and surfaces of known density: how well does each method find both?"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.manifold import methods
from benchmarks.manifold.methods import Method
from benchmarks.manifold.mixture_flow import MixtureFlow
from benchmarks.manifold.output import Row, markdown, save_figure
from benchmarks.manifold.targets import TARGETS, Target
from mflow_kernels import ManifoldObjective, VectorFlow
from mflow_kernels.layers import Bijection
from mflow_kernels.models.objectives import Rho
from mflow_kernels.models.penalty_weight import Domain

NOISE = 0.05
BATCH, RATE = 256, 3e-3
STEPS, WIDTH = 4, 64  # size of every flow
WEIGHT = 1000.0  # weight of the reconstruction error in every method
PIE_DEVIATION = 0.1
HUBER_DELTA = 0.1  # twice the standard deviation of the noise
TEST_POINTS, SAMPLES, CELLS = 2000, 10_000, 100

PLAIN, PIE, MFLOW = "plain likelihood", "PIE", "M-flow, two phases"
DENOISING, RECTANGULAR = "denoising flow", "rectangular flow"
OURS, OURS_HIERARCHY = "penalized (data, l2)", "penalized, hierarchy"
METHODS = (PLAIN, PIE, MFLOW, DENOISING, RECTANGULAR, OURS, OURS_HIERARCHY)

DOMAINS: tuple[Domain, ...] = ("latent", "data")
RHOS: tuple[Rho, ...] = ("l2", "l1", "huber")
WEIGHTS = (10.0, 100.0, 1000.0)
SCANNED = "sphere"


@dataclass(frozen=True)
class Task:
    """One training run. In the scan of penalties, `objective` is (domain, rho, weight)."""

    target: str
    noise: float
    method: str
    seed: int
    steps: int
    objective: tuple[Domain, Rho, float] | None = None


def tasks(seeds: Sequence[int], quick: bool) -> list[Task]:
    """Return the comparison of methods and the scan of penalties, seed by seed."""
    steps = 100 if quick else 400
    targets, noises = (("circle",), (NOISE,)) if quick else (tuple(TARGETS), (0.0, NOISE))
    tasks: list[Task] = []
    for seed in seeds:
        tasks += [
            Task(target, noise, method, seed, steps)
            for target in targets
            for noise in noises
            for method in METHODS
        ]
        tasks += [
            Task(SCANNED, NOISE, "scan", seed, steps, (domain, rho, weight))
            for domain in DOMAINS
            for rho in RHOS[: 1 if quick else None]
            for weight in WEIGHTS[:: 2 if quick else 1]
        ]
    return tasks


def run(task: Task) -> dict[str, Any]:
    """Train and measure one method; return its row and the data of the pictures."""
    target = TARGETS[task.target]
    torch.manual_seed(task.seed)  # for the weights
    generator = torch.Generator().manual_seed(task.seed)
    method = build(task, target, generator)
    started = time.process_time()
    methods.train(method, batches(target, task.noise, generator), task.steps, RATE)
    seconds = time.process_time() - started
    row: dict[str, Any] = {
        "target": task.target, "noise": task.noise, "method": task.method, "seed": task.seed,
        "steps": task.steps, "seconds": seconds,
        "parameters": sum(p.numel() for p in method.model.parameters()),
    }  # fmt: skip
    if task.objective:
        row |= dict(zip(("domain", "rho", "weight"), task.objective, strict=True))
    return row | measure(method, target, task.noise, task.method == PLAIN)


def batches(target: Target, noise: float, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield new batches (BATCH, 3), float32, forever."""
    while True:
        yield _noisy(target.sample(BATCH, generator), noise, generator).float()


def build(task: Task, target: Target, generator: torch.Generator) -> Method:
    """Build the method of a task with new networks."""
    flow, dim = VectorFlow(3, STEPS, WIDTH, reversible=False), target.dim
    if task.objective:
        domain, rho, weight = task.objective
        scanned = ManifoldObjective(domain, rho, weight=weight, delta=HUBER_DELTA)
        return methods.penalized(flow, dim, scanned)
    objective = ManifoldObjective("data", "l2", weight=WEIGHT)
    if task.method == PLAIN:
        return methods.plain(flow, dim)
    if task.method == PIE:
        return methods.pie(flow, dim, PIE_DEVIATION)
    if task.method == MFLOW:
        return methods.two_phases(flow, dim, _further(dim))
    if task.method == DENOISING:  # adds noise of its own, also to data without noise
        return methods.denoising(flow, dim, NOISE, WEIGHT, generator)
    if task.method == RECTANGULAR:
        return methods.rectangular(flow, dim, WEIGHT)
    if task.method == OURS:
        return methods.penalized(flow, dim, objective)
    if task.method == OURS_HIERARCHY:
        return methods.hierarchical(flow, dim, objective, _further(dim))
    raise ValueError(f"method: expected one of {METHODS}, got {task.method!r}")


@torch.no_grad()
def measure(method: Method, target: Target, noise: float, ambient: bool) -> dict[str, Any]:
    """Measure a method on held-out points, the same for all methods and seeds."""
    generator = torch.Generator().manual_seed(10**6)
    clean = target.sample(TEST_POINTS, generator)
    noisy = _noisy(clean, noise, generator)
    samples = method.sample(SAMPLES, generator).double()
    model = method.model
    truth = target.log_density(clean)
    density: Tensor | None
    if not ambient:
        density = model.manifold_log_prob(clean.float()).value.double()
    elif noise:
        # On a noisy manifold, p(x) is the density on the manifold times that of the noise at 0
        # (inflation and deflation, Horvat and Pfister, arXiv 2105.12152).
        height = (3 - target.dim) / 2 * math.log(2 * math.pi * noise**2)
        density = model.log_prob(clean.float()).double() + height
    else:
        density = None
    error = None if density is None else truth - density
    projections = model.project(noisy.float()).double()
    return {
        "sample_distance": target.distance(samples).mean().item(),
        "projection_distance": target.distance(projections).mean().item(),
        "reconstruction": (model.project(clean.float()) - clean).norm(dim=1).mean().item(),
        "density_error": None if error is None else error.abs().mean().item(),
        "density_bias": None if error is None else error.mean().item(),
        "divergence": divergence(target, samples),
        "picture": {
            "samples": samples[:800].tolist(),
            "density": None if density is None else [truth[:500].tolist(), density[:500].tolist()],
        },
    }


def divergence(target: Target, samples: Tensor) -> float:
    """Estimate KL(truth || samples) in nats.

    Samples are projected onto the manifold. Both distributions are then counted in CELLS cells,
    each of which holds the points nearest to one of CELLS points of the manifold.
    """
    centres, truth = _cells(target.name)
    finite = samples[samples.isfinite().all(1)]
    if not len(finite):
        return math.inf
    counts = _counts(target.nearest(finite), centres)
    model = (counts + 0.5) / (len(finite) + 0.5 * CELLS)
    return (truth * (truth / model).log()).sum().item()


@cache
def _cells(name: str) -> tuple[Tensor, Tensor]:
    target, generator = TARGETS[name], torch.Generator().manual_seed(10**6 + 1)
    centres = target.sample(CELLS, generator)
    counts = _counts(target.sample(200_000, generator), centres)
    return centres, counts / counts.sum()


def _counts(points: Tensor, centres: Tensor) -> Tensor:
    nearest = torch.cat([torch.cdist(p, centres).argmin(1) for p in points.split(20_000)])
    return nearest.bincount(minlength=CELLS).double()


def _noisy(x: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    return x + noise * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def _further(dim: int) -> Bijection:
    return MixtureFlow() if dim == 1 else VectorFlow(dim, STEPS, WIDTH, reversible=False)


METRICS = {
    "sample_distance": ("distance of samples", ".4f"),
    "projection_distance": ("distance of projections", ".4f"),
    "reconstruction": ("reconstruction error", ".4f"),
    "density_error": ("mean abs. error of log p", ".3f"),
    "density_bias": ("mean log p* - log p", ".3f"),
    "divergence": ("KL of samples", ".3f"),
}


def report(rows: Sequence[Row], folder: Path) -> str:
    """Write the pictures and return the tables."""
    compared = [row for row in rows if row["method"] != "scan"]
    scanned = [row for row in rows if row["method"] == "scan"]
    first = min(row["seed"] for row in rows)
    shown = [row for row in compared if row["noise"] == NOISE and row["seed"] == first]
    _draw_samples(folder / "points_samples.png", shown)
    _draw_densities(folder / "points_densities.png", shown)
    floors = ", ".join(
        f"{name} {divergence(TARGETS[name], _truth(name)):.3f}"
        for name in dict.fromkeys(row["target"] for row in rows)
    )
    keys = {"target": "target", "noise": "noise", "method": "method"}
    seconds = {"seconds": ("CPU s", ".1f")}
    scan_keys = {"domain": "domain", "rho": "rho", "weight": "w"}
    text = [
        "## Points on curves and surfaces\n",
        markdown(compared, keys, METRICS | seconds),
        f"\nThe KL of as many true samples is {floors}; no method can do much better.\n",
        f"\n### Penalties on the {SCANNED}, noise {NOISE}, one flow, no hierarchy\n",
        markdown(scanned, scan_keys, METRICS),
    ]
    return "\n".join(text) + "\n"


def _truth(name: str) -> Tensor:
    return TARGETS[name].sample(SAMPLES, torch.Generator().manual_seed(10**6 + 2))


def _draw_samples(path: Path, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(row["target"] for row in rows))
    figure = Figure(figsize=(2.4 * (len(METHODS) + 1), 2.7 * len(names)), layout="constrained")
    figure.suptitle(f"Samples, data with noise {NOISE}; red: more than 0.1 from the manifold")
    axes = figure.subplots(
        len(names), len(METHODS) + 1, squeeze=False, subplot_kw={"projection": "3d"}
    )
    for line, name in zip(axes, names, strict=True):
        clouds = {"truth": _truth(name)[:800]}
        for row in rows:
            if row["target"] == name:
                clouds[row["method"]] = torch.tensor(row["picture"]["samples"]).double()
        limits = [(c.min().item() - 0.1, c.max().item() + 0.1) for c in clouds["truth"].unbind(1)]
        for axis, (title, cloud) in zip(line, clouds.items(), strict=True):
            far = TARGETS[name].distance(cloud) > 0.1
            colours = ["tab:red" if f else "tab:blue" for f in far]
            axis.scatter(*cloud.T.tolist(), s=2, c=colours, depthshade=False, linewidths=0)
            axis.set(xlim=limits[0], ylim=limits[1], zlim=limits[2])
            axis.set(xticklabels=[], yticklabels=[], zticklabels=[])
            axis.view_init(elev=25, azim=-50)
            axis.set_title(f"{name}: {title}" if title == "truth" else title, fontsize=9)
    save_figure(path, figure)


def _draw_densities(path: Path, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(row["target"] for row in rows))
    figure = Figure(figsize=(2.4 * len(METHODS), 2.6 * len(names)), layout="constrained")
    figure.suptitle(f"Log-density on the manifold at true points, data with noise {NOISE}")
    axes = figure.subplots(len(names), len(METHODS), squeeze=False)
    for row in rows:
        axis = axes[names.index(row["target"])][METHODS.index(row["method"])]
        truth, model = cast("list[list[float]]", row["picture"]["density"])
        low, high = min(truth), max(truth)
        axis.scatter(truth, model, s=3, linewidths=0)
        axis.axline((low, low), slope=1, color="0.5", lw=0.8)
        axis.set(xlim=(low - 0.5, high + 0.5), ylim=(low - 2.5, high + 1.5))
        axis.set_title(f"{row['target']}: {row['method']}", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("true", fontsize=7)
        axis.set_ylabel("model", fontsize=7)
    save_figure(path, figure)
