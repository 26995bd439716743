"""The figures of a trained method on digits or patches: likelihood, reconstructions, samples."""

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.manifold.judge import judge
from benchmarks.manifold.networks import SHAPE
from benchmarks.manifold.other_images import beside_digits
from benchmarks.manifold.peers import VariationalAutoencoder
from benchmarks.manifold.sets import SETS, Part
from benchmarks.manifold.training import Method
from mflow_kernels import HierarchicalFlow, ManifoldFlow, local_dimension
from mflow_kernels.data.dequantization import dequantize, to_image
from mflow_kernels.evaluation.ood import auroc
from mflow_kernels.models.bits import bits_per_dimension
from mflow_kernels.models.chart import Chart

VALIDATION_IMAGES = 200  # number of images for the likelihood and the error in the sweep
SHOWN = 12  # images of each kind in a picture
OUTSIDE = 200  # images of each set that a model is not trained on
NARROW, MEASURED = 0.02, 8  # deviation below which a direction does not count; number of images
MORE = 256  # importance samples of a VAE's second bound


@torch.no_grad()
def validate(set_name: str, method: Method) -> dict[str, float | None]:
    """Measure a method on the validation images of a set.

    The score is the Frechet distance of samples, either on the manifold or with v drawn,
    whichever is smaller. Bits per dimension and reconstruction error are those of the first
    VALIDATION_IMAGES images.
    """
    generator = torch.Generator().manual_seed(10**6)
    reference = SETS[set_name]().validation
    x = dequantize(reference.images[:VALIDATION_IMAGES], 8, generator)
    found = _frechet_of_samples(set_name, method, reference)
    score = min(value for value in found.values() if value is not None)
    bits, error, _ = _likelihood_and_error(method, x)
    return {"score": score, "squared_error": error.mean().item(), "bits": _mean(bits)}


@torch.no_grad()
def measure(set_name: str, method: Method) -> dict[str, Any]:
    """Measure a method on test images, with the same noise for all methods and seeds."""
    test = SETS[set_name]().test
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
    return _frechet_of_samples(set_name, method, test) | {
        "bits": _mean(bits),
        "squared_error": error.mean().item(),
        "frechet_projections": judge(set_name).frechet(to_image(projected), test),
        "auroc": _outside(method, test.images, bits, error),
        "dimension": _dimension(method, x[:MEASURED]),
        "bits_of_more": _bits_of_more(method, x),
        "picture": {name: images.tolist() for name, images in picture.items()},
    }  # fmt: skip


def _frechet_of_samples(set_name: str, method: Method, reference: Part) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for off in (False, True):
        name = f"frechet_{'off' if off else 'on'}"
        found[name] = None
        if not off or method.density:
            generator = torch.Generator().manual_seed(10**6 + 1)
            n = len(reference.images)
            samples = method.model.sample(n, generator=generator, off_manifold=off)
            found[name] = judge(set_name).frechet(to_image(samples.nan_to_num()), reference)
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
