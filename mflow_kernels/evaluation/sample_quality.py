"""FID, KID, precision and recall of a model's samples, at several temperatures."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mflow_kernels.data.dequantization import to_image
from mflow_kernels.data.generators import Stream, stream_generator
from mflow_kernels.data.progress import progress_bar
from mflow_kernels.data.splits import ImageSet
from mflow_kernels.evaluation.classes import sampled_classes
from mflow_kernels.evaluation.features import FeatureNetwork, SampleQuality, feature_distance
from mflow_kernels.evaluation.samples import TEMPERATURES
from mflow_kernels.models import HierarchicalFlow
from mflow_kernels.runs.folder import Trained

_FEATURE_BATCH = 50


@torch.no_grad()
def sample_quality(
    run: Trained,
    images: ImageSet,
    features: tuple[str, FeatureNetwork],
    most: int,
    ambient: bool = False,
) -> tuple[SampleQuality, ...]:
    """Compare samples at each of TEMPERATURES with the first images, at most `most` of each, by
    the features of a network with its name.

    With `ambient`, the off-manifold coordinates of samples are drawn too.
    """
    name, network = features
    network = network.to(run.device)
    count = min(most, len(images))
    rows = []
    with progress_bar("features", count * (1 + len(TEMPERATURES))) as progress:
        done = 0

        def extract(batches: Iterator[Tensor]) -> Tensor:
            nonlocal done
            parts = []
            for batch in batches:
                parts.append(network(batch.to(run.device)))
                done += len(batch)
                progress(done)
            return torch.cat(parts)

        rows_of = torch.arange(count).split(_FEATURE_BATCH)
        real = extract(map(images.batch, rows_of))
        for temperature in TEMPERATURES:
            fake = extract(_sample_batches(run.model, count, temperature, ambient))
            distance = feature_distance(real, fake)
            rows.append(SampleQuality(temperature, name, count, distance, ambient))
    return tuple(rows)


def _sample_batches(
    model: HierarchicalFlow, count: int, temperature: float, ambient: bool
) -> Iterator[Tensor]:
    """Yield uint8 samples, as a file would hold them, from the same draws at each temperature."""
    device = next(model.parameters()).device
    generator = stream_generator(0, Stream.REPORT_SAMPLES, device=device)
    for begin in range(0, count, _FEATURE_BATCH):
        number = min(_FEATURE_BATCH, count - begin)
        context = sampled_classes(model, number)
        how: dict[str, Any] = {"temperature": temperature, "generator": generator}
        yield to_image(model.sample(number, context=context, off_manifold=ambient, **how))
