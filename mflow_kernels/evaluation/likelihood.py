"""What a trained model is worth on images it has not seen."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from mflow_kernels.data.batches import OrderedBatches
from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.files import write_atomically
from mflow_kernels.data.generators import Stream, stream_generator
from mflow_kernels.data.manifest import MANIFEST, TEST
from mflow_kernels.data.printable import printable
from mflow_kernels.data.progress import progress_bar
from mflow_kernels.data.splits import ImageSet, load_evaluation_set, load_splits
from mflow_kernels.models import HierarchicalFlow, ManifoldFlow
from mflow_kernels.models.bits import bits_per_dimension
from mflow_kernels.runs.folder import Run, read_manifest


@dataclass(frozen=True)
class StageFigures:
    """Means over the images, of the model up to one stage.

    bits_per_dim = n_bits - (on_manifold + off_manifold + logdet), the three parts being the
    log-densities and the log-determinant in bits per dimension. The error is that of the images'
    projections, clipped to the range of images, on the [0, 1] scale; psnr is of that mean, in dB.
    """

    bits_per_dim: float
    on_manifold: float
    off_manifold: float
    logdet: float
    mean_squared_error: float
    psnr: float


@dataclass(frozen=True)
class Evaluation:
    """`stages` holds the figures of stage 1 alone, of stages 1 and 2, and so on."""

    data: str
    images: int
    manifold_dims: tuple[int, ...]
    stages: tuple[StageFigures, ...]

    def write(self, path: Path) -> None:
        """As JSON."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text))

    def print(self) -> None:
        """As a table on stdout."""
        title = f"Evaluation on {self.images:,} images of {escape(printable(self.data))}"
        table = Table(title=title)
        table.add_column("")
        for number, dim in enumerate(self.manifold_dims, start=1):
            stages = "stage 1" if number == 1 else f"stages 1-{number}"
            table.add_column(f"{stages}\n{dim} dimensions", justify="right")
        rows = {
            "bits per dimension": ("bits_per_dim", ".4f"),
            "  of it: log-density on the manifold": ("on_manifold", "+.4f"),
            "         log-density off it": ("off_manifold", "+.4f"),
            "         log-determinant": ("logdet", "+.4f"),
            "projection: mean squared error": ("mean_squared_error", ".5f"),
            "projection: PSNR (dB)": ("psnr", ".2f"),
        }
        for label, (name, form) in rows.items():
            table.add_row(label, *(format(getattr(stage, name), form) for stage in self.stages))
        Console().print(table)
        print("Parts are in bits per dimension; bits per dimension = bits of a pixel - their sum.")


@torch.no_grad()
def evaluate_model(
    model: HierarchicalFlow,
    images: ImageSet,
    n_bits: int,
    *,
    data: str,
    device: torch.device,
    batch_size: int | None = None,
) -> Evaluation:
    """Figures of a model on a set of images; the same images give the same figures.

    Args:
        model: in evaluation mode, on `device`.
        images: of the model's image shape.
        n_bits: bits of each colour that the model was trained on.
        data: what to call the images.
        device: where to compute.
        batch_size: images at a time; by default `batch_of` their shape.

    Raises:
        ValueError: images of another shape.
    """
    check_image_shape(images, model)
    stages = cast(list[ManifoldFlow], list(model.stages))
    dims = math.prod(images.image_shape)
    sums = torch.zeros(len(stages), 4, dtype=torch.float64)
    for number, batch in enumerate(_told("evaluating", images, batch_size)):
        generator = stream_generator(0, Stream.EVALUATION_NOISE, number, device=device)
        x = dequantize(batch.to(device), n_bits, generator)
        u, outside, logdet = x, x.new_zeros(len(x)), x.new_zeros(len(x))
        for index, stage in enumerate(stages):
            terms = stage.terms(u)
            u = stage.encode(u)
            outside = outside + terms.off_manifold
            logdet = logdet + terms.logdet
            projected = model.project(x, index + 1)
            squared = (projected.clamp(-0.5, 0.5) - x).square().flatten(1).mean(1)
            for column, part in enumerate((terms.on_manifold, outside, logdet, squared)):
                sums[index, column] += part.double().sum().cpu()
    means = sums / len(images)
    figures = []
    for on, off, volume, squared in means.tolist():
        total = torch.tensor(on + off + volume, dtype=torch.float64)
        bits = bits_per_dimension(total, dims, n_bits).item()
        scale = 1 / (dims * math.log(2.0))
        psnr = -10 * math.log10(squared) if squared else math.inf
        figures.append(StageFigures(bits, on * scale, off * scale, volume * scale, squared, psnr))
    manifold_dims = tuple(stage.manifold_dim for stage in stages)
    return Evaluation(data, len(images), manifold_dims, tuple(figures))


def batch_of(image_shape: tuple[int, ...]) -> int:
    """How many images of this shape to compute at a time: 100, and fewer of large ones, so that
    the widest networks' hidden channels take a few GB."""
    return max(1, min(100, 2**22 // math.prod(image_shape)))


def _told(what: str, images: ImageSet, batch_size: int | None) -> Iterator[Tensor]:
    """Batches of all images in order; how many are done is told."""
    done = 0
    with progress_bar(what, len(images)) as progress:
        for batch in OrderedBatches(images, batch_size or batch_of(images.image_shape)):
            yield batch
            done += len(batch)
            progress(done)


@torch.no_grad()
def importance_weighted_bits(
    model: HierarchicalFlow,
    images: ImageSet,
    n_bits: int,
    draws: int,
    *,
    device: torch.device,
    batch_size: int | None = None,
) -> float:
    """Bits per dimension by `draws` dequantizations of each image; means over the images.

    -log2 of (1 / K) sum_k p(x + u_k), K draws of the noise u: a tighter bound of the probability of
    the image than the mean of the log-densities, which `evaluate_model` reports (Burda et al.,
    arXiv 1509.00519; Ho et al., arXiv 1902.00275, section 3.1). The first draw is that of
    `evaluate_model`, so that with one they agree.

    Args:
        model, images, n_bits, device, batch_size: as for `evaluate_model`.
        draws: K, at least 1.
    """
    dims = math.prod(images.image_shape)
    total = torch.zeros((), dtype=torch.float64)
    for number, batch in enumerate(_told("importance weights", images, batch_size)):
        generator = stream_generator(0, Stream.EVALUATION_NOISE, number, device=device)
        levels = batch.to(device)
        each = [model.log_prob(dequantize(levels, n_bits, generator)) for _ in range(draws)]
        log_mean = torch.stack(each).double().logsumexp(0) - math.log(draws)
        total += log_mean.sum().cpu()
    return bits_per_dimension(total / len(images), dims, n_bits).item()


class HeldOut(NamedTuple):
    """The images to evaluate a run on."""

    images: ImageSet
    name: str  # what to call them
    skipped: tuple[str, ...]  # names of files that are no images, or broken ones
    warning: str | None  # why they may not be what the run held out


def held_out_images(run: Run, data: str | None) -> HeldOut:
    """The images to evaluate a run on.

    Args:
        run: a trained run.
        data: a folder, zip or prepared file that the run was not trained on, taken whole (of
            CelebA, the test part); None or the run's own data: the images that it held out. If
            that data set has changed since, these are found by their names.

    Raises:
        ValueError: no images there, none left that the run held out, or of other channels than the
            model's.
    """
    then = read_manifest(run.folder)
    warning = None
    if data is None or run.config.data in (data, str(Path(data).resolve())):
        name = run.config.data_name
        splits = load_splits(run.config.data, run.config.image_size)
        images, skipped = splits.test, splits.skipped
        different = splits.manifest.difference(then) if then else None
        if then is None:
            warning = f"{run.folder} has no {MANIFEST}: images may have been trained on"
        elif different:
            images = splits.held_out_by(then)
            count = int((then.parts == TEST).sum())
            warning = (
                f"since the run was trained, its data has changed: {different}; taking "
                f"{len(images):,} of the {count:,} images that it held out"
            )
    else:
        name = Path(data).resolve().name
        images, skipped, manifest = load_evaluation_set(data, run.config.image_shape[1])
        trained_on = int(manifest.trained_on(then).sum()) if then else 0
        if trained_on:
            warning = f"the run was trained on {trained_on:,} of the {len(images):,} images"
    check_image_shape(images, run.model)
    return HeldOut(images, name, skipped, warning)


def check_image_shape(images: ImageSet, model: HierarchicalFlow, argument: str = "data") -> None:
    """ValueError if the model was made for images of another shape, channels named first."""
    expected, came = model.input_shape, images.image_shape
    if came[0] != expected[0]:
        raise ValueError(
            f"{argument}: expected images with {expected[0]} colour channels, got {came[0]}"
            if expected[0] > 1
            else f"{argument}: expected grey images, got {came[0]} colour channels"
        )
    if came != expected:
        raise ValueError(f"{argument}: expected images of shape {expected}, got {came}")
