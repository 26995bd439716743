"""Digits and patches of photographs: likelihood, reconstructions and samples of every method."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.manifold import pictures, tables
from benchmarks.manifold.comparison import ABOUT, Comparison, about_runs, finals, in_order
from benchmarks.manifold.judge import judge
from benchmarks.manifold.methods import RECIPES, Networks, components
from benchmarks.manifold.output import Row, Store, markdown
from benchmarks.manifold.sets import SETS, SIDE, Images, Part
from benchmarks.manifold.training import Method
from mflow_kernels import Glow, VectorFlow
from mflow_kernels.data.batches import BatchStream
from mflow_kernels.data.dequantization import dequantize, to_image
from mflow_kernels.data.splits import ImageSet
from mflow_kernels.models.bits import bits_per_dimension
from mflow_kernels.models.chart import Chart

SHAPE, DIM = (1, SIDE, SIDE), 32
LEVELS, STEPS, WIDTH, WIDE = 2, 2, 32, 55
PRIOR_STEPS, PRIOR_WIDTH = 4, 32
# Channels of the autoencoder: with the parameters of the flow, and with the prior's as well.
CHANNELS, MORE_CHANNELS = 7, 12
DEVIATION, LESS_NOISE = 0.1, 0.02  # standard deviations of v in PIE and denoising flows
BATCH = 64
VALIDATION_IMAGES = 200  # number of images for the likelihood and the error in the sweep
SHOWN = 12  # images of each kind in a picture
METRICS = {
    "bits": ("bits per dimension", ".3f"),
    "squared_error": ("reconstruction error (MSE)", ".5f"),
    "frechet_projections": ("Frechet distance of projections", ".2f"),
    "frechet_on_0.7": ("of samples, v = 0, T = 0.7", ".1f"),
    "frechet_on_1.0": ("v = 0, T = 1", ".1f"),
    "frechet_off_0.7": ("v drawn, T = 0.7", ".1f"),
    "frechet_off_1.0": ("v drawn, T = 1", ".1f"),
}
REFERENCE = "penalized, hierarchy"  # the method that the others are compared with, seed by seed


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
            prior=lambda: VectorFlow(DIM, PRIOR_STEPS, PRIOR_WIDTH),
            autoencoder=lambda more: autoencoder(MORE_CHANNELS if more else CHANNELS),
            training_data=lambda: dequantize(
                self.images.train.images, 8, torch.Generator().manual_seed(0)
            ),
            deviation=DEVIATION,
            less_noise=LESS_NOISE,
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

    @torch.no_grad()
    def validate(self, method: Method) -> dict[str, float | None]:
        """Measure a method on validation images.

        The score is the Frechet distance of samples at temperature 1, either on the manifold or
        with v drawn, whichever is smaller. Bits per dimension and reconstruction error are those
        of the first VALIDATION_IMAGES images.
        """
        generator = torch.Generator().manual_seed(10**6)
        x = dequantize(self.images.validation.images[:VALIDATION_IMAGES], 8, generator)
        found = self._frechet_of_samples(method, self.images.validation, (1.0,))
        score = min(value for value in found.values() if value is not None)
        return {"score": score} | self._likelihood_and_error(method, x)[0]

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
        projected = project(method.model, x)
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


def project(model: Chart, x: Tensor) -> Tensor:
    """Return the projections of many images, clipped to their range."""
    return torch.cat([model.project(part) for part in x.split(250)]).clamp(-0.5, 0.5)


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


def comparison(name: str, quick: bool) -> ImageComparison:
    rates, weights, extensions = (6.4e-3, 1.6e-2, 4e-2), (25.0, 100.0, 400.0), 3
    seconds = {"digits": 20.0, "patches": 8.0}[name]
    if quick:
        seconds, rates, weights, extensions = 2.5, (1.6e-2,), (100.0,), 0
    return ImageComparison(name, seconds, 0.3, rates, weights, extensions, set=name)


# Methods that are also trained with other weights, for the frontier of likelihood against error.
FRONTIER = (
    "denoising flow",
    "denoising flow, less noise",
    "penalized, hierarchy",
    "falling weight, hierarchy",
    "error bound, hierarchy",
)
FRONTIER_FACTORS = (1 / 16, 1 / 4, 4.0)
BUDGETS = (0.5, 2.0)  # CPU time of further trainings, to find a plateau; 1 is `seconds`


def run(name: str, store: Store, quick: bool) -> None:
    """Make the runs of a set. The sweep on the digits chooses the settings of both sets."""
    compared = comparison(name, quick)
    chosen = comparison("digits", quick).choose(store)
    compared.compare(store, chosen, range(1 if quick else 5))
    if name != "digits" or quick:
        return
    for method in FRONTIER:
        for factor in FRONTIER_FACTORS:
            settings = chosen[method]._replace(weight=factor * chosen[method].weight)
            compared.train(store, method, settings, 0, stage="frontier")
    trained = [method for method in chosen if RECIPES[method].build is not components]
    for share in BUDGETS:
        for method in trained:
            compared.train(store, method, chosen[method], 0, share, f"budget{share:g}")


def report(name: str, store: Store) -> dict[str, str]:
    """Draw the pictures of the runs of a set, and return their tables by name."""
    rows = finals(store, name)
    images, judged = SETS[name](), judge(name)
    pictures.draw_samples(store.folder / f"{name}.png", name, rows, images.test.images)
    found = {n: finals(store, n) for n in SETS}
    frontiers = {n: in_order(store.rows(f"{n}-frontier-")) for n in SETS}
    pictures.draw_frontier(store.folder / "frontier.png", found, frontiers)
    n = len(images.test.images)
    floor = judged.frechet(images.train.images[:n], images.test)
    main = [
        markdown(rows, {"method": "method"}, METRICS),
        f"\nThe Frechet distance of {n} training images is {floor:.2f}; samples of a perfect "
        f"model would have about as much. The classifier is right on {judged.accuracy:.1%} of the "
        "test images.",
        about_runs(rows),
    ]
    details = []
    if differences := tables.differences(rows, REFERENCE, METRICS):
        details += [f"{tables.DIFFERENCES.capitalize()}:\n", differences]
    details += ["Settings and costs:\n", markdown(rows, {"method": "method"}, ABOUT), ""]
    if sweep := store.rows(f"{name}-sweep-"):
        details += ["The sweep, on seed 0:\n"]
        details += [tables.sweep(sweep, "Frechet distance", by_bits=True)]
    if budgets := store.rows(f"{name}-budget"):
        budgets = in_order([*budgets, *(row for row in rows if row["seed"] == 0 and row["steps"])])
        pictures.draw_budgets(store.folder / "plateau.png", budgets)
        shown = [row | {"budget": f"{row['share']:g}"} for row in budgets]
        keys = {"method": "method", "budget": "budget"}
        details += ["Other budgets on seed 0; 1 is the budget of all other tables:\n"]
        details += [
            markdown(shown, keys, {"steps_shown": ("steps", "")} | METRICS),
            about_runs(shown),
        ]
    if frontiers[name]:
        seed = [row for row in rows if row["seed"] == 0 and row["method"] in FRONTIER]
        shown = in_order([*frontiers[name], *seed])
        shown = [row | {"weight": f"{row['weight']:g}"} for row in shown]
        details += ["Other weights on seed 0:\n"]
        details += [markdown(shown, {"method": "method", "weight": "weight"}, METRICS)]
    return {name: "\n".join(main), f"{name}-details": "\n".join(details) + "\n"}
