"""Points on curves and surfaces of known density: how well does each method find both?"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.manifold import tables
from benchmarks.manifold.comparison import ABOUT, Comparison, about_runs, finals
from benchmarks.manifold.methods import Networks, names
from benchmarks.manifold.mixture_flow import MixtureFlow
from benchmarks.manifold.output import Row, Store, markdown, save_figure
from benchmarks.manifold.targets import TARGETS, Target
from benchmarks.manifold.training import Method
from mflow_kernels import VectorFlow

NOISE = 0.05  # standard deviation of the noise on the points
BATCH = 256
STEPS, WIDTH = 4, 64  # size of every flow
# Width of the autoencoder: with the parameters of the flow, and with the prior's as well.
HIDDEN, MORE_HIDDEN = 96, 128
TEST_POINTS, SAMPLES, CELLS = 2000, 10_000, 100
VALIDATION_POINTS = 1000
SWEPT = "sphere"  # all targets use the settings that are best on this one


@dataclass(frozen=True)
class PointComparison(Comparison):
    """All methods on noisy points of one target."""

    target: str = SWEPT

    def networks(self) -> Networks:
        dim = TARGETS[self.target].dim
        return Networks(
            (3,), dim,
            flow=lambda: VectorFlow(3, STEPS, WIDTH),
            prior=lambda: (
                MixtureFlow() if dim == 1 else VectorFlow(dim, STEPS, WIDTH)
            ),
            autoencoder=lambda more: autoencoder(dim, MORE_HIDDEN if more else HIDDEN),
            deviation=NOISE,
            volume={"method": "exact"},
        )  # fmt: skip

    def batches(self, seed: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield new batches (BATCH, 3), float32, forever."""
        while True:
            clean = TARGETS[self.target].sample(BATCH, generator)
            yield _noisy(clean, generator).float()

    def validate(self, method: Method) -> dict[str, float | None]:
        """Return the energy distance of samples to true points."""
        true = TARGETS[self.target].sample(VALIDATION_POINTS, torch.Generator().manual_seed(10**5))
        return {"score": energy_distance(_samples(method, VALIDATION_POINTS, 10**5 + 1), true)}

    @torch.no_grad()
    def measure(self, method: Method) -> dict[str, Any]:
        """Measure a method on held-out points, the same for all methods and seeds."""
        target, generator = TARGETS[self.target], torch.Generator().manual_seed(10**6)
        clean = target.sample(TEST_POINTS, generator)
        noisy = _noisy(clean, generator)
        samples = _samples(method, SAMPLES, 10**6 + 3)
        model = method.model
        truth = target.log_density(clean)
        if method.ambient:
            # On a noisy manifold, p(x) is the density on the manifold times that of the noise at 0
            # (inflation and deflation, Horvat and Pfister, arXiv 2105.12152).
            height = (3 - target.dim) / 2 * math.log(2 * math.pi * NOISE**2)
            density = model.log_prob(clean.float()).double() + height
        else:
            density = model.manifold_log_prob(clean.float()).value.double()
        error = truth - density
        projections = model.project(noisy.float()).double()
        return {
            "energy": energy_distance(samples[:TEST_POINTS], _truth(target.name)[:TEST_POINTS]),
            "sample_distance": target.distance(samples).mean().item(),
            "projection_distance": target.distance(projections).mean().item(),
            "reconstruction": (model.project(clean.float()) - clean).norm(dim=1).mean().item(),
            "density_error": error.abs().mean().item(),
            "density_bias": error.mean().item(),
            "divergence": divergence(target, samples),
            "picture": {
                "samples": samples[:800].tolist(),
                "density": [truth[:500].tolist(), density[:500].tolist()],
            },
        }


def autoencoder(dim: int, width: int) -> tuple[nn.Module, nn.Module]:
    """Build an encoder and a decoder, smooth because the volume needs derivatives."""

    def network(a: int, b: int) -> nn.Module:
        first, middle, last = nn.Linear(a, width), nn.Linear(width, width), nn.Linear(width, b)
        return nn.Sequential(first, nn.SiLU(), middle, nn.SiLU(), last)

    return network(3, dim), network(dim, 3)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return 2 E|x - y| - E|x - x'| - E|y - y'|: 0 only if both distributions are the same."""
    if not x.isfinite().all():
        return math.inf
    cross, own, other = torch.cdist(x, y).mean(), torch.cdist(x, x).sum(), torch.cdist(y, y).sum()
    n, m = len(x), len(y)
    return (2 * cross - own / (n * (n - 1)) - other / (m * (m - 1))).item()


def _samples(method: Method, n: int, seed: int) -> Tensor:
    """Draw the method's own samples: with v only if it fills the space."""
    generator = torch.Generator().manual_seed(seed)
    drawn = method.model.sample(n, generator=generator, off_manifold=method.ambient)
    return drawn.double()


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


def _noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + NOISE * torch.randn(x.shape, generator=generator, dtype=x.dtype)


MEDIAN = {"density_median": ("median abs. error of log p", ".3f")}  # finite if few points are not
REFERENCE = "penalized, hierarchy"  # the method that the others are compared with, seed by seed
METRICS = {
    "energy": ("energy distance of samples", ".4f"),
    "sample_distance": ("distance of samples", ".4f"),
    "projection_distance": ("distance of projections", ".4f"),
    "reconstruction": ("reconstruction error", ".4f"),
    "density_error": ("mean abs. error of log p", ".3f"),
    "density_bias": ("mean log p* - log p", ".3f"),
    "divergence": ("KL of samples", ".3f"),
}


def run(store: Store, quick: bool) -> None:
    """Make the runs. The sweep on SWEPT chooses the settings of all targets."""
    seconds, rates, weights, extensions = 4.0, (4e-3, 1e-2, 2.5e-2), (100.0, 400.0, 1600.0), 3
    if quick:
        seconds, rates, weights, extensions = 1.5, (4e-3,), (400.0,), 0

    def comparison(target: str) -> PointComparison:
        return PointComparison(
            f"points-{target}", seconds, rates, weights, extensions, target=target
        )

    chosen = comparison(SWEPT).choose(store, names(comparison(SWEPT).networks()))
    for seed in range(1 if quick else 5):
        for target in (SWEPT,) if quick else TARGETS:
            comparison(target).compare(store, chosen, [seed])


def report(store: Store) -> dict[str, str]:
    """Draw the pictures of the runs, and return their tables by name."""
    found = {target: finals(store, f"points-{target}", f"points-{SWEPT}") for target in TARGETS}
    targets = [target for target, rows in found.items() if rows]
    rows = [
        row | {"target": target, "density_median": _median_error(row)}
        for target in targets
        for row in found[target]
    ]
    first = [row for row in rows if row["seed"] == 0]
    _draw_samples(store.folder / "points_samples.png", first)
    _draw_densities(store.folder / "points_densities.png", first)
    floors = [f"{name} {_floor(name)}" for name in targets]
    main = [
        markdown(rows, {"target": "target", "method": "method"}, METRICS | MEDIAN | ABOUT),
        f"\nThe KL and the energy distance of as many true samples: {', '.join(floors)}.",
        about_runs(rows),
    ]
    details = [
        *(_differences(rows, target) for target in targets),
        f"The sweep, on seed 0 of the {SWEPT}:\n",
        tables.sweep(store.rows(f"points-{SWEPT}-run-"), "energy distance", by_bits=False),
    ]
    return {"points": "\n".join(main), "points-details": "\n".join(details)}


def _median_error(row: Row) -> float | None:
    """Return the median absolute error of log p, over the points whose densities are drawn."""
    if "failed" in row:
        return None
    truth, model = row["picture"]["density"]
    return statistics.median(abs(a - b) for a, b in zip(truth, model, strict=True))


def _differences(rows: Sequence[Row], target: str) -> str:
    found = [row for row in rows if row["target"] == target]
    table = tables.differences(found, REFERENCE, METRICS | MEDIAN)
    return f"On the {target}, {tables.DIFFERENCES}:\n\n{table}" if table else ""


def _floor(name: str) -> str:
    points = _truth(name)
    energy = energy_distance(points[:TEST_POINTS], points[TEST_POINTS : 2 * TEST_POINTS])
    return f"{divergence(TARGETS[name], points):.3f} and {energy:.4f}"


def _truth(name: str) -> Tensor:
    return TARGETS[name].sample(SAMPLES, torch.Generator().manual_seed(10**6 + 2))


def _draw_samples(path: Path, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(row["target"] for row in rows))
    figure = Figure(
        figsize=(2.4 * (len(_methods(rows)) + 1), 2.7 * len(names)), layout="constrained"
    )
    figure.suptitle(f"Samples, data with noise {NOISE}; red: more than 0.1 from the manifold")
    axes = figure.subplots(
        len(names), len(_methods(rows)) + 1, squeeze=False, subplot_kw={"projection": "3d"}
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
    figure = Figure(figsize=(2.4 * len(_methods(rows)), 2.6 * len(names)), layout="constrained")
    figure.suptitle(f"Log-density on the manifold at true points, data with noise {NOISE}")
    axes = figure.subplots(len(names), len(_methods(rows)), squeeze=False)
    for row in rows:
        axis = axes[names.index(row["target"])][_methods(rows).index(row["method"])]
        truth, model = row["picture"]["density"]
        low, high = min(truth), max(truth)
        axis.scatter(truth, model, s=3, linewidths=0)
        axis.axline((low, low), slope=1, color="0.5", lw=0.8)
        axis.set(xlim=(low - 0.5, high + 0.5), ylim=(low - 2.5, high + 1.5))
        axis.set_title(f"{row['target']}: {row['method']}", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("true", fontsize=7)
        axis.set_ylabel("model", fontsize=7)
    save_figure(path, figure)


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))
