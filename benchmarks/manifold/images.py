"""Digits and patches of photographs: likelihood, reconstructions and samples of every method."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.manifold import pictures
from benchmarks.manifold.comparison import ABOUT, Comparison, about_runs, finals
from benchmarks.manifold.methods import RECIPES, Method, Networks
from benchmarks.manifold.output import Row, Store, markdown
from benchmarks.manifold.sets import SETS, SIDE, Images, Part
from mflow_kernels import Glow, VectorFlow
from mflow_kernels.data.batches import BatchStream
from mflow_kernels.data.dequantization import dequantize, to_image
from mflow_kernels.data.splits import ImageSet
from mflow_kernels.models.bits import bits_per_dimension

SHAPE, DIM = (1, SIDE, SIDE), 32
LEVELS, STEPS, WIDTH, WIDE = 2, 2, 32, 55
PRIOR_STEPS, PRIOR_WIDTH = 4, 32
# Channels of the autoencoder: with the parameters of the flow, and with the prior's as well.
CHANNELS, MORE_CHANNELS = 7, 12
DEVIATION = 0.1  # standard deviation of v in PIE and denoising flows
BATCH = 64
CURVE_IMAGES = 200
FEATURES, CLASSIFIER_PASSES = 32, 8
SHOWN = 12  # images of each kind in a picture


@dataclass(frozen=True)
class ImageComparison(Comparison):
    """All methods on one set of images."""

    set: str = "digits"

    @property
    def images(self) -> Images:
        return SETS[self.set]()

    def networks(self) -> Networks:
        return Networks(
            SHAPE, DIM,
            flow=lambda: Glow(SHAPE, LEVELS, STEPS, WIDTH, reversible=False),
            wide_flow=lambda: Glow(SHAPE, LEVELS, STEPS, WIDE, reversible=False),
            prior=lambda: VectorFlow(DIM, PRIOR_STEPS, PRIOR_WIDTH, reversible=False),
            autoencoder=lambda more: autoencoder(MORE_CHANNELS if more else CHANNELS),
            training_data=lambda: dequantize(
                self.images.train.images, 8, torch.Generator().manual_seed(0)
            ),
            deviation=DEVIATION,
            volume={"volume_samples": 8, "probes": 2, "iterations": 8},
        )  # fmt: skip

    def batches(self, seed: int, generator: torch.Generator) -> Iterator[Tensor]:
        for batch in BatchStream(ImageSet(self.images.train.images), BATCH, seed):
            yield dequantize(batch, 8, generator)

    def rank(self, row: Row) -> float | None:
        """Return bits per dimension for methods that maximize only the likelihood, else the score.

        Plain likelihood is the reference for bits per dimension, so they choose its settings.
        """
        return row["bits"] if RECIPES[row["method"]].by_likelihood else row["score"]

    def score(self, method: Method) -> float:
        """Return the Frechet distance of samples to the validation images, at temperature 1.

        The result is the smaller of two distances: that of samples on the manifold, and that of
        samples with v drawn.
        """
        found = self._frechet_of_samples(method, self.images.validation, (1.0,))
        return min(value for value in found.values() if value is not None)

    @torch.no_grad()
    def point(self, method: Method) -> dict[str, float | None]:
        """Measure bits per dimension and reconstruction error on a few validation images."""
        generator = torch.Generator().manual_seed(10**6)
        images = self.images.validation.images[:CURVE_IMAGES]
        return self._likelihood_and_error(method, dequantize(images, 8, generator))[0]

    @torch.no_grad()
    def measure(self, method: Method) -> dict[str, Any]:
        """Measure a method on the test images, with the same noise for all methods and seeds."""
        test = self.images.test
        generator = torch.Generator().manual_seed(10**6)
        x = dequantize(test.images, 8, generator)
        figures, projected = self._likelihood_and_error(method, x)
        frechet = self._frechet_of_samples(method, test, (0.7, 1.0))
        shown = method.sample(SHOWN, 0.7, torch.Generator().manual_seed(0))
        picture = {"samples": to_image(shown), "projections": to_image(projected[:SHOWN])}
        if method.off_deviation is not None:
            drawn = method.sample(SHOWN, 0.7, torch.Generator().manual_seed(0), off=True)
            picture["samples, v drawn"] = to_image(drawn)
        return figures | frechet | {
            "frechet_projections": judge(self.set).frechet(to_image(projected), test),
            "picture": {name: images.tolist() for name, images in picture.items()},
        }  # fmt: skip

    def _likelihood_and_error(
        self, method: Method, x: Tensor
    ) -> tuple[dict[str, float | None], Tensor]:
        parts = x.split(250)
        projected = torch.cat([method.model.project(part) for part in parts]).clamp(-0.5, 0.5)
        bits = None
        if method.off_deviation is not None:
            log_prob = torch.cat([method.model.log_prob(part) for part in parts])
            bits = bits_per_dimension(log_prob, math.prod(SHAPE), 8).mean().item()
        return {"bits": bits, "squared_error": (projected - x).square().mean().item()}, projected

    def _frechet_of_samples(
        self, method: Method, reference: Part, temperatures: tuple[float, ...]
    ) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for off in (False, True):
            for temperature in temperatures:
                name = f"frechet_{'off' if off else 'on'}_{temperature}"
                found[name] = None
                if not off or method.off_deviation is not None:
                    generator = torch.Generator().manual_seed(10**6 + 1)
                    n = len(reference.images)
                    samples = to_image(method.sample(n, temperature, generator, off))
                    found[name] = judge(self.set).frechet(samples, reference)
        return found


def autoencoder(channels: int) -> tuple[nn.Module, nn.Module]:
    """Build a convolutional encoder and decoder, smooth because the volume needs derivatives."""
    c = channels
    encoder = nn.Sequential(
        nn.Conv2d(1, c, 4, 2, 1), nn.SiLU(), nn.Conv2d(c, 2 * c, 4, 2, 1), nn.SiLU(),
        nn.Flatten(), nn.Linear(2 * c * 16, DIM),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Linear(DIM, 2 * c * 16), nn.Unflatten(1, (2 * c, 4, 4)), nn.SiLU(),
        nn.ConvTranspose2d(2 * c, c, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(c, 1, 4, 2, 1),
    )  # fmt: skip
    return encoder, decoder


class Judge:
    """A small classifier whose features give Frechet distances."""

    def __init__(self, images: Images) -> None:
        train = images.train
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2, 2), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 16, FEATURES),
        )  # fmt: skip
        classes = nn.Linear(FEATURES, int(train.labels.max()) + 1)
        net = nn.Sequential(self.features, nn.ReLU(), classes)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(CLASSIFIER_PASSES):
            for index in torch.randperm(len(train.images)).split(64):
                optimizer.zero_grad()
                out = net(_scaled(train.images[index]))
                nn.functional.cross_entropy(out, train.labels[index]).backward()
                optimizer.step()
        with torch.no_grad():
            right = net(_scaled(images.test.images)).argmax(1) == images.test.labels
            self.accuracy = right.float().mean().item()

    @torch.no_grad()
    def frechet(self, images: Tensor, reference: Part) -> float:
        """Return the Frechet distance between two sets of images (Heusel et al., arXiv 1706.08500).

        It fits Gaussians to the classifier's features of both sets:
        |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).
        """
        means, covariances = [], []
        for part in (images, reference.images):
            features = self.features(_scaled(part)).double()
            means.append(features.mean(0))
            covariances.append(features.T.cov())
        root = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp_min(0).sqrt().sum()
        trace = covariances[0].trace() + covariances[1].trace() - 2 * root
        return ((means[0] - means[1]).square().sum() + trace).item()


@cache
def judge(name: str) -> Judge:
    """Train the classifier of a set from a fixed seed."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        return Judge(SETS[name]())


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 128 - 1


def comparison(name: str, quick: bool) -> ImageComparison:
    rates, more_rates, weights = (6e-3, 1.6e-2), (2.5e-3, 4e-2), (100.0, 25.0, 400.0)
    seconds = {"digits": 12.0, "patches": 6.0}[name]
    if quick:
        seconds, rates, more_rates, weights = 2.5, (1.6e-2,), (), (100.0,)
    return ImageComparison(name, seconds, 0.2, rates, weights, more_rates, set=name)


METRICS = {
    "bits": ("bits per dimension", ".3f"),
    "squared_error": ("reconstruction error (MSE)", ".5f"),
    "frechet_projections": ("Frechet distance of projections", ".2f"),
    "frechet_on_0.7": ("of samples, v = 0, T = 0.7", ".1f"),
    "frechet_on_1.0": ("v = 0, T = 1", ".1f"),
    "frechet_off_0.7": ("v drawn, T = 0.7", ".1f"),
    "frechet_off_1.0": ("v drawn, T = 1", ".1f"),
}
# Methods that are also trained for longer, to see whether the budget is enough.
LONGER = ("plain likelihood, prior flow", "penalized, hierarchy", "free-form injective flow")
LONGER_SHARE = 2.0


def run(name: str, store: Store, quick: bool) -> None:
    """Make the runs of a set. The sweep on the digits chooses the settings of both sets."""
    compared = comparison(name, quick)
    chosen = comparison("digits", quick).choose(store)
    compared.compare(store, chosen, range(1 if quick else 5))
    if name == "digits" and not quick:
        for method in LONGER:
            compared.train(store, method, chosen[method], 0, LONGER_SHARE, "longer")


def report(name: str, store: Store) -> str:
    """Draw the pictures of the runs of a set, and return their tables."""
    rows = finals(store, name)
    pictures.draw_samples(store.folder / f"{name}.png", name, rows, SETS[name]().test.images)
    pictures.draw_frontier(store.folder / "frontier.png", {n: finals(store, n) for n in SETS})
    pictures.draw_plateau(store.folder / "plateau.png", finals(store, "digits"))
    images, judged = SETS[name](), judge(name)
    n = len(images.test.images)
    floor = judged.frechet(images.train.images[:n], images.test)
    text = [
        markdown(rows, {"method": "method"}, METRICS),
        f"\nThe Frechet distance of {n} training images is {floor:.2f}; no method can do much "
        f"better. The classifier is right on {judged.accuracy:.1%} of the test images.\n",
        markdown(rows, {"method": "method"}, ABOUT),
        about_runs(rows),
        sweep_table(store.rows(f"{name}-sweep-")) if name == "digits" else "",
        plateau_table(store.rows(f"{name}-longer-"), rows),
    ]
    return "\n".join(text)


def sweep_table(rows: list[Row]) -> str:
    """Return one line per method: the result of each setting, best first."""
    lines = ["| method | chosen by | result at (learning rate, weight) |", "|---|---|---|"]
    for method, recipe in RECIPES.items():
        found = [row for row in rows if row["method"] == method]
        if not found:
            continue
        key = "bits" if recipe.by_likelihood else "score"
        found.sort(key=lambda row, key=key: math.inf if row.get(key) is None else row[key])
        cells = []
        for row in found:
            weight = f", {row['weight']:g}" if recipe.weighted else ""
            value = "not finite" if row.get(key) is None else f"{row[key]:.3g}"
            cells.append(f"{value} at ({row['rate']:g}{weight})")
        by = "bits per dimension" if recipe.by_likelihood else "Frechet distance"
        lines.append(f"| {method} | {by} | {'; '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plateau_table(longer: list[Row], rows: list[Row]) -> str:
    """Return a table of the longer runs beside the runs of the comparison with the same seed."""
    if not longer:
        return ""
    both = []
    for row in longer:
        same = [r for r in rows if (r["method"], r["seed"]) == (row["method"], row["seed"])]
        both += [r | {"budget": f"{r['share']:g}"} for r in (*same, row)]
    return "\n" + markdown(both, {"method": "method", "budget": "budget"}, METRICS) + "\n"
