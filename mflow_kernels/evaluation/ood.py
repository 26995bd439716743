"""Out-of-distribution (OOD) scores: how well a model separates held-out images from others."""

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.generators import Stream, stream_generator
from mflow_kernels.evaluation.classes import context_of
from mflow_kernels.evaluation.likelihood import evaluation_batch_size
from mflow_kernels.models import HierarchicalFlow, local_dimension
from mflow_kernels.models.bits import bits_per_dimension
from mflow_kernels.models.chart import off_manifold_score
from mflow_kernels.models.images import pillow_images
from mflow_kernels.models.volume import Method

SCORED_IMAGES = 256  # largest number of scored images of each set
# Every score, with its heading and the format of its median. Higher means farther from the data.
SCORES = {
    "bits_per_dim": ("bits per dimension", ".3f"),
    "typicality": ("typicality", ".3f"),
    "corrected_bits": ("bits less PNG's", ".3f"),
    "distance": ("distance", ".3f"),
    "latent_score": ("latent score", ".1f"),
    "ood_score": ("OOD score", ".1f"),
    "bits_or_dimension": ("bits or local dimension", ".2f"),
}
DENSITY_BATCH = 8  # images between two updates of the progress bar; a batch may take minutes
# Largest D x d float64 Jacobian, in bytes, for which the exact method is used.
_JACOBIAN_BYTES = 2**30
_DENSITY_IMAGES = 64  # most images of each set whose density is computed
_DENSITY_WORK = 2**31  # most elements in all Jacobians of a set together
_TINY = 1e-12  # in place of the standard deviation of equal numbers


@dataclass(frozen=True)
class SetScores:
    """Medians of the scores over a set of images, and each score's AUROC against the first set.

    The AUROC is the probability that an image of this set scores above an image of the first set,
    the evaluated images: 0.5 means that the score does not separate the sets, 1 that it separates
    them perfectly. Scores that were not computed are absent, and the first set has no AUROC.
    """

    name: str
    images: int
    medians: dict[str, float]
    aurocs: dict[str, float]


class TrainingScores(NamedTuple):
    """Means over training images, with which the scores compare an image.

    Attributes:
        deviation: their deviation from the manifold, as `Chart.deviation` computes it.
        bits_per_dim, bits_spread: their bits per dimension, and the standard deviation of these.
        dimension, dimension_spread: the same for their local dimension at the scale `deviation`,
            of the first `density_images` images; None if it was not computed.
    """

    deviation: float
    bits_per_dim: float
    bits_spread: float = 1.0
    dimension: float | None = None
    dimension_spread: float = 1.0


def training_scores(
    model: HierarchicalFlow,
    images: Tensor,
    n_bits: int,
    progress: Callable[[int], None] | None = None,
) -> TrainingScores:
    """Compute TrainingScores from uint8 images (N, C, H, W) that the model was trained on.

    `progress` is called with the number of images whose local dimension is done. None leaves it
    out.
    """
    scores = score_images(model, images, n_bits, None)
    off = math.prod(model.input_shape) - model.manifold_dim
    deviation = math.sqrt(scores["distance"].square().mean().item() / off) if off else 0.0
    bits = scores["bits_per_dim"]
    found = TrainingScores(deviation, bits.mean().item(), bits.std(correction=0).item())
    count = density_images(model)
    if not deviation or not count or progress is None:
        return found
    generator = stream_generator(0, Stream.OOD_NOISE, device=next(model.parameters()).device)
    dimensions: list[Tensor] = []
    for batch in images[:count].split(DENSITY_BATCH):
        x = dequantize(batch.to(generator.device), n_bits, generator)
        dimensions.append(_dimension(model, x, deviation, context_of(model, x), generator))
        progress(sum(map(len, dimensions)))
    each = torch.cat(dimensions)
    return found._replace(
        dimension=each.mean().item(), dimension_spread=each.std(correction=0).item()
    )


def _dimension(
    model: HierarchicalFlow,
    x: Tensor,
    deviation: float,
    context: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    how: dict[str, Any] = {"method": density_method(model), "generator": generator}
    return local_dimension(model, x, deviation, context=context, **how).value.double()


def density_images(model: HierarchicalFlow) -> int:
    """Return the number of images of a set for which the density on the manifold is computed.

    It depends on the model's dimensions only, and is 0 if one image costs too much.
    """
    work = math.prod(model.input_shape) * model.manifold_dim
    return min(_DENSITY_IMAGES, _DENSITY_WORK // work)


def density_method(model: HierarchicalFlow) -> Method:
    """Return the method of `manifold_log_prob` to use: exact if the Jacobian is small enough."""
    bytes_needed = 8 * math.prod(model.input_shape) * model.manifold_dim
    return "exact" if bytes_needed <= _JACOBIAN_BYTES else "hutchinson"


@torch.no_grad()
def score_images(
    model: HierarchicalFlow,
    images: Tensor,
    n_bits: int,
    training: TrainingScores | None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Score uint8 images (N, C, H, W). A higher score means farther from the training data.

        bits_per_dim    of the image under the model.
        typicality      |bits_per_dim - its mean over training images|: images may also be too
                        probable (Nalisnick et al., arXiv 1906.02994, for one image).
        corrected_bits  bits_per_dim less those of the image as a PNG file, since simple images are
                        probable under any flow (Serra et al., arXiv 1909.11480).
        distance        to the projection on the manifold, on the [0, 1] scale.
        latent_score    `Chart.ood_score` without its volume term, in nats.
        ood_score       `Chart.ood_score` in nats, of the first `density_images` images.
        bits_or_dimension  of the same images: how many standard deviations the bits_per_dim are
                        above, or the local dimension is below, its mean over training images,
                        whichever is more. Kamkari et al. (arXiv 2403.18910) call an image out of
                        distribution if its likelihood or its local dimension is low. They set the
                        two thresholds separately; in one score they have one unit.

    All scores but the last two take three passes through the flow together.

    Args:
        model: model in evaluation mode.
        images: images on any device.
        n_bits: bits of each colour channel that the model was trained on.
        training: scores of training images; None leaves out the scores that need them: typicality,
            latent_score, ood_score and bits_or_dimension.
        progress: called with the number of images whose ood_score is done. None leaves out the
            last two scores.

    Returns:
        float64 tensors (N,) on the CPU, by the names of SCORES.
    """
    device = next(model.parameters()).device
    generator = stream_generator(0, Stream.OOD_NOISE, device=device)
    parts: dict[str, list[Tensor]] = {name: [] for name in SCORES}
    # The deviation is 0 if the manifold is the whole space.
    deviation = training.deviation if training else 0.0
    off = math.prod(model.input_shape) - model.manifold_dim
    left = density_images(model) if deviation and progress else 0
    for batch in images.split(evaluation_batch_size(images.shape[1:])):
        x = dequantize(batch.to(device), n_bits, generator)
        context = context_of(model, x)
        log_prob = model.log_prob(x, context=context)
        bits = bits_per_dimension(log_prob, math.prod(x.shape[1:]), n_bits).double()
        u = model.encode(x, context=context)
        distance = (x - model.decode(u, context=context)).flatten(1).norm(dim=1)
        parts["bits_per_dim"].append(bits)
        parts["corrected_bits"].append(bits - png_bits(batch, n_bits).to(device))
        parts["distance"].append(distance)
        if training is not None:
            parts["typicality"].append((bits - training.bits_per_dim).abs())
        if deviation:
            latent = off_manifold_score(distance, deviation, off)
            latent -= model.coordinates_log_prob(u)
            parts["latent_score"].append(latent)
        count = min(left, len(x))
        for first in range(0, count, DENSITY_BATCH):
            rows = slice(first, min(first + DENSITY_BATCH, count))
            part, own = x[rows], None if context is None else context[rows]
            probes = stream_generator(0, Stream.OOD_NOISE, left, device=device)
            method = density_method(model)
            score = model.ood_score(part, deviation, context=own, method=method, generator=probes)
            parts["ood_score"].append(score)
            if training is not None and training.dimension is not None:
                above = (bits[rows] - training.bits_per_dim) / max(training.bits_spread, _TINY)
                below = training.dimension - _dimension(model, part, deviation, own, probes)
                below = below / max(training.dimension_spread, _TINY)
                parts["bits_or_dimension"].append(torch.maximum(above, below))
            left -= len(part)
            assert progress is not None
            progress(sum(map(len, parts["ood_score"])))
    return {name: torch.cat(part).double().cpu() for name, part in parts.items() if part}


def png_bits(images: Tensor, n_bits: int) -> Tensor:
    """Return the bits per dimension (N,), float64, of images as PNG files.

    The images are uint8 (N, C, H, W) and are reduced to n_bits first.
    """
    sizes = []
    for image in pillow_images(images >> (8 - n_bits)):
        file = io.BytesIO()
        image.save(file, "png", optimize=True)
        sizes.append(file.tell())
    return 8 * torch.tensor(sizes, dtype=torch.float64) / math.prod(images.shape[1:])


def compare_sets(scores: Mapping[str, Mapping[str, Tensor]]) -> tuple[SetScores, ...]:
    """Summarize the scores of each set and compare them with the first set, the evaluated images.

    Args:
        scores: for each set, by name, the result of `score_images`.
    """
    reference = next(iter(scores.values()))
    rows = []
    for name, own in scores.items():
        medians = {key: values.nanmedian().item() for key, values in own.items()}
        others = {} if own is reference else own
        aurocs = {key: auroc(reference[key], values) for key, values in others.items()}
        rows.append(SetScores(name, len(own["bits_per_dim"]), medians, aurocs))
    return tuple(rows)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Return the probability that a score of `outside` is above a score of `inside`.

    Ties count as half. NaN counts as the highest score: it means that a density overflowed.
    """
    from torchmetrics.functional.classification import binary_auroc

    values = torch.cat([inside, outside]).nan_to_num(math.inf, math.inf, -math.inf)
    # torchmetrics applies a sigmoid to numbers outside [0, 1], which would tie large scores.
    ranks = torch.unique(values, return_inverse=True)[1].double()
    target = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    return binary_auroc(ranks / ranks.max().clamp(min=1), target).item()


def made_up_sets(images: Tensor) -> dict[str, Tensor]:
    """Make two sets of the same size and shape as these uint8 images, without other data.

    They are the negatives of the images, and uniform noise.
    """
    generator = stream_generator(0, Stream.UNIFORM_IMAGES)
    noise = torch.randint(0, 256, images.shape, generator=generator, dtype=torch.uint8)
    return {"negatives (255 - image)": 255 - images, "uniform noise": noise}
