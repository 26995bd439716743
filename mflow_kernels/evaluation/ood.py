"""Out-of-distribution (OOD) scores: how well a model separates held-out images from others."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.generators import Stream, stream_generator
from mflow_kernels.evaluation.classes import context_of
from mflow_kernels.evaluation.likelihood import evaluation_batch_size
from mflow_kernels.models import HierarchicalFlow
from mflow_kernels.models.bits import bits_per_dimension
from mflow_kernels.models.volume import Method

SCORED_IMAGES = 256  # of each set
DENSITY_BATCH = 8  # images between two updates of the progress bar; a batch may take minutes
# Largest D x d float64 Jacobian, in bytes, for which the exact method is used.
_JACOBIAN_BYTES = 2**30
_DENSITY_IMAGES = 64  # most images of each set whose density is computed
_DENSITY_WORK = 2**31  # most elements in all Jacobians of a set together


@dataclass(frozen=True)
class SetScores:
    """Medians of the scores over a set of images, and each score's AUROC against the held-out set.

    The AUROC is the probability that an image of this set scores above a held-out image: 0.5 means
    that the score does not separate the sets, 1 that it separates them perfectly. A value is None
    if its score was not computed; the held-out set itself has no AUROC.
    """

    name: str
    images: int
    bits_per_dim: float
    distance: float
    ood_score: float | None
    auroc_bits_per_dim: float | None
    auroc_distance: float | None
    auroc_ood_score: float | None


def density_images(model: HierarchicalFlow) -> int:
    """Number of images of a set for which the density on the manifold is computed. It depends on
    the model's dimensions only; 0 if one image costs too much."""
    work = math.prod(model.input_shape) * model.manifold_dim
    return min(_DENSITY_IMAGES, _DENSITY_WORK // work)


def density_method(model: HierarchicalFlow) -> Method:
    """The method of `manifold_log_prob` to use: exact if the Jacobian is small enough."""
    bytes_needed = 8 * math.prod(model.input_shape) * model.manifold_dim
    return "exact" if bytes_needed <= _JACOBIAN_BYTES else "hutchinson"


@torch.no_grad()
def score_images(
    model: HierarchicalFlow,
    images: Tensor,
    n_bits: int,
    deviation: float | None,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Tensor]:
    """Score uint8 images (N, C, H, W). A higher score means farther from the training data.

    Args:
        model: model in evaluation mode.
        images: images on any device.
        n_bits: bits of each colour channel that the model was trained on.
        deviation: deviation of the training data from the manifold (`Chart.deviation`); None
            leaves ood_score out.
        progress: called with the number of images whose ood_score is done.

    Returns:
        float64 tensors on the CPU: bits_per_dim (N,); distance (N,), on the [0, 1] scale; and
        ood_score, in nats, of the first `density_images` images.
    """
    device = next(model.parameters()).device
    generator = stream_generator(0, Stream.OOD_NOISE, device=device)
    parts: dict[str, list[Tensor]] = {"bits_per_dim": [], "distance": [], "ood_score": []}
    left = density_images(model) if deviation else 0
    for batch in images.split(evaluation_batch_size(images.shape[1:])):
        x = dequantize(batch.to(device), n_bits, generator)
        context = context_of(model, x)
        log_prob = model.log_prob(x, context=context)
        bits = bits_per_dimension(log_prob, math.prod(x.shape[1:]), n_bits)
        parts["bits_per_dim"].append(bits)
        parts["distance"].append(model.distance(x, context=context))
        if not deviation or not left:
            continue
        count = min(left, len(x))
        for first in range(0, count, DENSITY_BATCH):
            rows = slice(first, min(first + DENSITY_BATCH, count))
            part, own = x[rows], None if context is None else context[rows]
            probes = stream_generator(0, Stream.OOD_NOISE, left, device=device)
            method = density_method(model)
            score = model.ood_score(part, deviation, context=own, method=method, generator=probes)
            parts["ood_score"].append(score)
            left -= len(part)
            progress(sum(map(len, parts["ood_score"])))
    return {name: torch.cat(part).double().cpu() for name, part in parts.items() if part}


def compare_sets(scores: Mapping[str, Mapping[str, Tensor]]) -> tuple[SetScores, ...]:
    """Summarize the scores of each set and compare them with the first set, the held-out images.

    Args:
        scores: for each set, by name, the result of `score_images`.
    """
    reference = next(iter(scores.values()))
    rows = []
    for name, own in scores.items():
        medians = {key: values.nanmedian().item() for key, values in own.items()}
        aurocs = {
            f"auroc_{key}": None if own is reference else auroc(reference[key], values)
            for key, values in own.items()
        }
        missing = {"ood_score": None, "auroc_ood_score": None}
        count = len(own["bits_per_dim"])
        rows.append(SetScores(name=name, images=count, **{**missing, **medians, **aurocs}))  # type: ignore[arg-type]
    return tuple(rows)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that a score of `outside` is above a score of `inside`; ties count as half.

    NaN, which a density that overflowed gives, counts as the highest score.
    """
    from torchmetrics.functional.classification import binary_auroc

    values = torch.cat([inside, outside]).nan_to_num(math.inf, math.inf, -math.inf)
    # torchmetrics applies a sigmoid to numbers outside [0, 1], which would tie large scores.
    ranks = torch.unique(values, return_inverse=True)[1].double()
    target = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    return binary_auroc(ranks / ranks.max().clamp(min=1), target).item()


def made_up_sets(images: Tensor) -> dict[str, Tensor]:
    """Two sets made without other data, as many images and of the same shape as the uint8 images
    given: their negatives, and uniform noise."""
    generator = stream_generator(0, Stream.UNIFORM_IMAGES)
    noise = torch.randint(0, 256, images.shape, generator=generator, dtype=torch.uint8)
    return {"negatives (255 - image)": 255 - images, "uniform noise": noise}
