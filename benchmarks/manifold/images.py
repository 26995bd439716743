"""Digits and patches of photographs: likelihood, reconstructions and samples of every method."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.manifold import pictures, tables
from benchmarks.manifold.comparison import ABOUT, Comparison, Settings, about_runs, finals, in_order
from benchmarks.manifold.judge import judge
from benchmarks.manifold.methods import RECIPES, Networks, names
from benchmarks.manifold.other_images import beside_digits
from benchmarks.manifold.output import Row, Store, markdown
from benchmarks.manifold.peers import VariationalAutoencoder
from benchmarks.manifold.sets import SETS, SIDE, Images, Part
from benchmarks.manifold.tarflow import TarFlow, VectorTarFlow
from benchmarks.manifold.training import Method
from mflow_kernels import Glow, HierarchicalFlow, Jet, ManifoldFlow, VectorFlow, local_dimension
from mflow_kernels.data.batches import BatchStream
from mflow_kernels.data.dequantization import dequantize, to_image
from mflow_kernels.data.splits import ImageSet
from mflow_kernels.evaluation.ood import auroc
from mflow_kernels.models.bits import bits_per_dimension
from mflow_kernels.models.chart import Chart
from mflow_kernels.ops.scale import ScaleFunction

SHAPE, DIM = (1, SIDE, SIDE), 32
LEVELS, STEPS, WIDTH, WIDE = 2, 2, 32, 55
PRIOR_STEPS, PRIOR_WIDTH, COMPONENTS = 4, 32, 20
# Channels of the autoencoder: with the parameters of the flow, and with the prior's as well.
CHANNELS, MORE_CHANNELS = 7, 12
VAE_CHANNELS = 10
# Jet's own scale function, 2 sigmoid, at most doubles a number in a coupling. Six couplings then
# reach no less than 6.7 bits per dimension: black pixels vary by only one level of grey.
JET_CLAMP = 3.0
DEVIATION, LESS_NOISE = 0.1, 0.02  # standard deviations of v in PIE and denoising flows
BATCH = 64
VALIDATION_IMAGES = 200  # number of images for the likelihood and the error in the sweep
SHOWN = 12  # images of each kind in a picture
OUTSIDE = 200  # images of each set that a model is not trained on
NARROW, MEASURED = 0.02, 8  # deviation below which a direction does not count; number of images
MORE = 256  # importance samples of a VAE's second bound
METRICS = {
    "bits": ("bits per dimension", ".3f"),
    "squared_error": ("reconstruction error (MSE)", ".5f"),
    "frechet_projections": ("Frechet distance of projections", ".2f"),
    "frechet_on": ("of samples, v = 0", ".1f"),
    "frechet_off": ("v drawn", ".1f"),
}
FURTHER = {
    "auroc_bits": ("AUROC of bits", ".3f"),
    "auroc_error": ("AUROC of the reconstruction error", ".3f"),
    "dimension": ("local dimension", ".0f"),
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
            components=COMPONENTS,
            spline_prior=lambda: VectorFlow(
                DIM, PRIOR_STEPS, PRIOR_WIDTH, coupling="spline", bins=4
            ),
            tarflow_prior=lambda: VectorTarFlow(
                DIM, channels=4, blocks=4, layers=1, width=20, heads=2
            ),
            jet=lambda: Jet(
                SHAPE, patch=4, couplings=12, depth=1, width=32, heads=2,
                scale=ScaleFunction("tanh", clamp=JET_CLAMP), reversible=False,
            ),
            tarflow=lambda: TarFlow(SHAPE, patch=2, blocks=4, layers=1, width=32, heads=2),
            autoencoder=lambda more: autoencoder(MORE_CHANNELS if more else CHANNELS),
            variational=lambda: autoencoder(VAE_CHANNELS, 2),
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

    def rank(self, method: str, validation: Row) -> float | None:
        """Return bits per dimension for methods that maximize only the likelihood, else the score.

        Plain likelihood is the reference for bits per dimension, so they choose its settings.
        """
        return validation["bits" if RECIPES[method].by_likelihood else "score"]

    @torch.no_grad()
    def validate(self, method: Method) -> dict[str, float | None]:
        """Measure a method on validation images.

        The score is the Frechet distance of samples, either on the manifold or with v drawn,
        whichever is smaller. Bits per dimension and reconstruction error are those of the first
        VALIDATION_IMAGES images.
        """
        generator = torch.Generator().manual_seed(10**6)
        x = dequantize(self.images.validation.images[:VALIDATION_IMAGES], 8, generator)
        found = self._frechet_of_samples(method, self.images.validation)
        score = min(value for value in found.values() if value is not None)
        bits, error, _ = _likelihood_and_error(method, x)
        return {"score": score, "squared_error": error.mean().item(), "bits": _mean(bits)}

    @torch.no_grad()
    def measure(self, method: Method) -> dict[str, Any]:
        """Measure a method on the test images, with the same noise for all methods and seeds."""
        test = self.images.test
        generator = torch.Generator().manual_seed(10**6)
        x = dequantize(test.images, 8, generator)
        bits, error, projected = _likelihood_and_error(method, x)
        shown = method.model.sample(SHOWN, generator=torch.Generator().manual_seed(0))
        picture = {"samples": to_image(shown), "projections": to_image(projected[:SHOWN])}
        if method.density:
            drawn = torch.Generator().manual_seed(0)
            picture["samples, v drawn"] = to_image(
                method.model.sample(SHOWN, generator=drawn, off_manifold=True)
            )
        return self._frechet_of_samples(method, test) | {
            "bits": _mean(bits),
            "squared_error": error.mean().item(),
            "frechet_projections": judge(self.set).frechet(to_image(projected), test),
            "auroc": _outside(method, test.images, bits, error),
            "dimension": _dimension(method, x[:MEASURED]),
            "bits_of_more": _bits_of_more(method, x),
            "picture": {name: images.tolist() for name, images in picture.items()},
        }  # fmt: skip

    def _frechet_of_samples(self, method: Method, reference: Part) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for off in (False, True):
            name = f"frechet_{'off' if off else 'on'}"
            found[name] = None
            if not off or method.density:
                generator = torch.Generator().manual_seed(10**6 + 1)
                n = len(reference.images)
                samples = method.model.sample(n, generator=generator, off_manifold=off)
                found[name] = judge(self.set).frechet(to_image(samples.nan_to_num()), reference)
        return found


def _likelihood_and_error(method: Method, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return bits per dimension and mean squared errors, (N,) each, and the projections."""
    projected = project(method.model, x)
    bits = None
    if method.density:
        log_prob = torch.cat([method.model.log_prob(part) for part in x.split(250)])
        bits = bits_per_dimension(log_prob, math.prod(SHAPE), 8)
    return bits, (projected - x).square().flatten(1).mean(1), projected


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else values.mean().item()


def _outside(
    method: Method, test: Tensor, bits: Tensor | None, error: Tensor
) -> dict[str, dict[str, float]]:
    """Return the AUROC of bits and of reconstruction errors, by set of images beside the test's."""
    found = {}
    for name, images in beside_digits(test, OUTSIDE).items():
        x = dequantize(images, 8, torch.Generator().manual_seed(10**6 + 2))
        own_bits, own_error, _ = _likelihood_and_error(method, x)
        found[name] = {"error": auroc(error, own_error)}
        if bits is not None and own_bits is not None:
            found[name]["bits"] = auroc(bits, own_bits)
    return found


def _bits_of_more(method: Method, x: Tensor) -> float | None:
    """Return a VAE's bound on bits per dimension with MORE importance samples."""
    if not isinstance(method.model, VariationalAutoencoder):
        return None
    fewer = method.model.samples
    method.model.samples = MORE
    bits, _, _ = _likelihood_and_error(method, x)
    method.model.samples = fewer
    return _mean(bits)


def _dimension(method: Method, x: Tensor) -> float | None:
    """Return the mean local dimension of the density in the space of x, if a flow gives it."""
    if not method.density or not isinstance(method.model, HierarchicalFlow):
        return None
    first = method.model.stages[0]
    assert isinstance(first, ManifoldFlow)
    return local_dimension(first.flow, x, NARROW).value.mean().item()


def project(model: Chart, x: Tensor) -> Tensor:
    """Return the projections of many images, clipped to their range."""
    return torch.cat([model.project(part) for part in x.split(250)]).clamp(-0.5, 0.5)


def autoencoder(channels: int, outputs: int = 1) -> tuple[nn.Module, nn.Module]:
    """Build a convolutional encoder and decoder, smooth because the volume needs derivatives.

    Both give `outputs` numbers for each number of the code and each pixel.
    """
    c, n = channels, outputs
    encoder = nn.Sequential(
        nn.Conv2d(1, c, 4, 2, 1), nn.SiLU(), nn.Conv2d(c, 2 * c, 4, 2, 1), nn.SiLU(),
        nn.Flatten(), nn.Linear(2 * c * 16, n * DIM),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Linear(DIM, 2 * c * 16), nn.Unflatten(1, (2 * c, 4, 4)), nn.SiLU(),
        nn.ConvTranspose2d(2 * c, c, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(c, n, 4, 2, 1),
    )  # fmt: skip
    return encoder, decoder


CLAIMED = (  # the methods with five seeds; the others have three
    "plain likelihood",
    "plain likelihood, prior flow",
    "penalized, hierarchy",
    "VAE, prior flow",
    "plain Jet",
    "plain Jet, prior flow",
    "penalized Jet, hierarchy",
    "plain TarFlow",
)
DRAWN = ("principal components, prior flow", "autoencoder, prior flow", "M-flow")  # beside them
OTHERS = ("M-flow", "penalized, hierarchy, spline prior", "penalized, hierarchy, TarFlow prior")
# CPU seconds of a training on the digits, and the methods that are trained for so long, with the
# number of their seeds. The first budget is that of all methods.
BUDGETS = {
    20.0: dict.fromkeys(CLAIMED, 5) | dict.fromkeys(OTHERS, 3),
    60.0: {
        "plain likelihood, prior flow": 5,
        "penalized, hierarchy": 5,
        "VAE, prior flow": 5,
        "plain Jet, prior flow": 3,
        "penalized Jet, hierarchy": 3,
        "plain TarFlow": 3,
    }
    | dict.fromkeys(OTHERS, 3),
    180.0: {
        "plain likelihood, prior flow": 5,
        "penalized, hierarchy": 5,
        "VAE, prior flow": 3,
        "plain Jet, prior flow": 3,
        "penalized Jet, hierarchy": 3,
        "plain TarFlow": 3,
    },
}
SHORTEST = min(BUDGETS)
# Methods that are also trained with other weights, for the frontier of likelihood against error.
FRONTIER = ("denoising flow", "penalized, hierarchy", "error bound, hierarchy")
FRONTIER_FACTORS = (1 / 16, 1 / 4, 4.0)
SEEDS, FEWER_SEEDS = range(5), range(3)


def comparison(name: str, quick: bool, seconds: float = SHORTEST) -> ImageComparison:
    key = name if seconds == SHORTEST else f"{name}-{seconds:g}s"
    rates, weights, extensions = (6.4e-3, 1.6e-2, 4e-2), (25.0, 100.0, 400.0), 3
    if quick:
        seconds, rates, weights, extensions = 2.5, (1.6e-2,), (100.0,), 0
    return ImageComparison(key, seconds, rates, weights, extensions, set=name)


def run(name: str, store: Store, quick: bool) -> None:
    """Make the runs of a set. The sweep on the digits chooses the settings of both sets."""
    digits = comparison("digits", quick)
    if quick:
        chosen = digits.choose(store, names(digits.networks()))
        comparison(name, quick).compare(store, chosen, range(1))
        return
    found = names(digits.networks())
    chosen = {}
    for group, seeds in (
        ([method for method in found if method in CLAIMED], SEEDS),
        ([method for method in found if method not in CLAIMED], FEWER_SEEDS),
    ):
        settings = digits.choose(store, group)
        comparison(name, quick).compare(store, settings, seeds)
        chosen |= settings
    if name == "digits":
        _frontier(digits, store, chosen)


def run_longer(store: Store, quick: bool) -> None:
    """Make the runs on digits with more CPU time, each budget's settings from those before it."""
    chosen: dict[str, Settings] | None = None
    for seconds, methods in () if quick else BUDGETS.items():
        compared = comparison("digits", quick, seconds)
        chosen = compared.choose(store, [*methods], chosen)
        for name, seeds in methods.items():
            compared.compare(store, {name: chosen[name]}, range(seeds))


def run_one(store: Store, method: str, seed: int, seconds: float) -> Row:
    """Return the row of one method, seed and budget on digits, and make what the store lacks of it:
    the sweeps of this budget and of the shorter ones, and the training."""
    chosen = None
    for budget in sorted(budget for budget in BUDGETS if budget <= seconds):
        compared = comparison("digits", False, budget)
        chosen = compared.choose(store, [method], chosen)
    assert chosen is not None
    return compared.train(store, method, chosen[method], seed)


def _frontier(digits: ImageComparison, store: Store, chosen: dict[str, Settings]) -> None:
    for method in FRONTIER:
        for factor in FRONTIER_FACTORS:
            weight = factor * chosen[method].weight
            for seed in FEWER_SEEDS:
                digits.train(store, method, chosen[method]._replace(weight=weight), seed)


def report(name: str, store: Store) -> dict[str, str]:
    """Draw the pictures of the runs of a set, and return their tables by name."""
    rows = [_flat(row) for row in finals(store, name, "digits")]
    images, judged = SETS[name](), judge(name)
    drawn = [row for row in rows if row["method"] in (*CLAIMED, *DRAWN)]
    pictures.draw_samples(store.folder / f"samples_{name}.png", name, drawn, images.test.images)
    found = {n: finals(store, n, "digits") for n in SETS}
    frontier = _other_weights(store)
    pictures.draw_frontier(store.folder / "frontier.png", found, {"digits": frontier})
    n = len(images.test.images)
    floor = judged.frechet(images.train.images[:n], images.test)
    main = [
        markdown(rows, {"method": "method"}, METRICS | FURTHER),
        f"\nThe Frechet distance of {n} training images is {floor:.2f}; samples of a perfect "
        f"model would have about as much. The classifier is right on {judged.accuracy:.1%} of the "
        "test images.",
        about_runs(rows),
    ]
    details = []
    if differences := tables.differences(rows, REFERENCE, METRICS | FURTHER):
        details += [f"{tables.DIFFERENCES.capitalize()}:\n", differences]
    details += ["Settings and costs:\n", markdown(rows, {"method": "method"}, ABOUT), ""]
    if name != "digits":
        return {name: "\n".join(main), f"{name}-details": "\n".join(details) + "\n"}
    details += ["The sweep, on seed 0:\n"]
    details += [tables.sweep(store.rows("digits-run-"), "Frechet distance", by_bits=True)]
    shown = [row | {n: f"{row[n]:g}" for n in ("rate", "weight")} for row in frontier]
    keys = {"method": "method", "rate": "learning rate", "weight": "weight"}
    details += ["Other weights:\n", markdown(shown, keys, METRICS)]
    return {
        name: "\n".join(main),
        f"{name}-details": "\n".join(details) + "\n",
        f"{name}-budgets": _budgets(store),
    }


def _budgets(store: Store) -> str:
    """Return the table of all budgets on the digits, and draw it."""
    rows: list[Row] = []
    for seconds, methods in BUDGETS.items():
        name = comparison("digits", False, seconds).name
        rows += [_flat(row) for row in finals(store, name) if row["method"] in methods]
    rows = in_order(rows)
    pictures.draw_budgets(store.folder / "plateau.png", rows)
    shown = [row | {"seconds_of": f"{row['budget']:g} s"} for row in rows]
    keys = {"method": "method", "seconds_of": "CPU time"}
    about = {"rate_shown": ABOUT["rate_shown"], "steps_shown": ABOUT["steps_shown"]}
    return markdown(shown, keys, METRICS | FURTHER | about) + about_runs(shown)


def _other_weights(store: Store) -> list[Row]:
    """Return the runs of each method of FRONTIER at the rate with which most weights were tried."""
    found = []
    for method in FRONTIER:
        rows = [row for row in store.rows("digits-run-") if row["method"] == method]
        weights: dict[float, set[float]] = {}
        for row in rows:
            weights.setdefault(row["rate"], set()).add(row["weight"])
        most = max(weights, key=lambda rate: len(weights[rate]), default=None)
        if most is not None and len(weights[most]) > 1:
            found += [row for row in rows if row["rate"] == most]
    return in_order(found)


def _flat(row: Row) -> Row:
    """Return a row with the means of its AUROC over the sets."""
    if "failed" in row:
        return row
    sets = row["auroc"].values()
    means = {}
    for score in ("bits", "error"):
        values = [own[score] for own in sets if score in own]
        means[f"auroc_{score}"] = sum(values) / len(values) if values else None
    return row | means
