"""How well a model tells images it was made for from others."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.generators import Stream, stream_generator
from mflow_kernels.data.progress import ProgressCallback
from mflow_kernels.evaluation.likelihood import batch_of
from mflow_kernels.models import HierarchicalFlow
from mflow_kernels.models.bits import bits_per_dimension
from mflow_kernels.models.volume import Method

SCORED_IMAGES = 256  # of each set
DENSITY_BATCH = 8  # images at a time: minutes on a CPU, so that it is told how far it has come
# Jacobians are exact while one of D x d float64 numbers takes no more, as by `manifold_log_prob`.
_JACOBIAN_BYTES = 2**30
_DENSITY_IMAGES = 64  # of each set, at most
_DENSITY_WORK = 2**31  # numbers that all Jacobians of a set hold together, at most


@dataclass(frozen=True)
class SetScores:
    """Medians over a set of images, and by each score how far it lies out: auroc is the chance that
    one of its images scores above a held-out one, so that 0.5 tells nothing and 1 all.

    None where the score was not computed, and the auroc of the held-out set itself.
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
    """For how many images of a set the density on the manifold is affordable, by a fixed rule."""
    work = math.prod(model.input_shape) * model.manifold_dim
    return min(_DENSITY_IMAGES, _DENSITY_WORK // work)


def density_method(model: HierarchicalFlow) -> Method:
    """Of `manifold_log_prob`: exact where the Jacobian fits."""
    bytes_needed = 8 * math.prod(model.input_shape) * model.manifold_dim
    return "exact" if bytes_needed <= _JACOBIAN_BYTES else "hutchinson"


@torch.no_grad()
def score(
    model: HierarchicalFlow,
    images: Tensor,
    n_bits: int,
    deviation: float | None,
    progress: ProgressCallback = lambda count: None,
) -> dict[str, Tensor]:
    """Scores of uint8 images (N, C, H, W), the higher the farther out, float64 on the CPU.

    Args:
        model: in evaluation mode.
        images: on any device.
        n_bits: bits of each colour that the model was trained on.
        deviation: of the training data from the manifold (`Chart.deviation`); None leaves
            ood_score out.
        progress: is called with the number of images that have their ood_score.

    Returns:
        bits_per_dim and distance (N,), the distance on the [0, 1] scale, and ood_score of the first
        `density_images` of them, nats.
    """
    device = next(model.parameters()).device
    generator = stream_generator(0, Stream.OOD_NOISE, device=device)
    parts: dict[str, list[Tensor]] = {"bits_per_dim": [], "distance": [], "ood_score": []}
    left = density_images(model) if deviation else 0
    for batch in images.split(batch_of(images.shape[1:])):
        x = dequantize(batch.to(device), n_bits, generator)
        log_prob = model.log_prob(x)
        bits = bits_per_dimension(log_prob, math.prod(x.shape[1:]), n_bits)
        parts["bits_per_dim"].append(bits)
        parts["distance"].append(model.distance(x))
        if not deviation or not left:
            continue
        for part in x[:left].split(DENSITY_BATCH):
            probes = stream_generator(0, Stream.OOD_NOISE, left, device=device)
            how = {"method": density_method(model), "generator": probes}
            parts["ood_score"].append(model.ood_score(part, deviation, **how))
            left -= len(part)
            progress(sum(map(len, parts["ood_score"])))
    return {name: torch.cat(part).double().cpu() for name, part in parts.items() if part}


def compare(scores: Mapping[str, Mapping[str, Tensor]]) -> tuple[SetScores, ...]:
    """Each set of `score` against the first one, the held-out images."""
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
    """The chance that one of `outside` scores above one of `inside`, ties as half.

    What is not a number, as where a density overflowed, lies out farthest.
    """
    from torchmetrics.functional.classification import binary_auroc

    values = torch.cat([inside, outside]).nan_to_num(math.inf, math.inf, -math.inf)
    # torchmetrics would send numbers beyond 0..1 through a sigmoid, which makes ties of large ones.
    ranks = torch.unique(values, return_inverse=True)[1].double()
    target = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    return binary_auroc(ranks / ranks.max().clamp(min=1), target).item()


def made_up_sets(images: Tensor) -> dict[str, Tensor]:
    """Two sets that no data need be fetched for, of the number and shape of uint8 images."""
    generator = stream_generator(0, Stream.UNIFORM_IMAGES)
    noise = torch.randint(0, 256, images.shape, generator=generator, dtype=torch.uint8)
    return {"negatives (255 - image)": 255 - images, "uniform noise": noise}
