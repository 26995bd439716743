"""Likelihood and reconstruction error of a trained model on held-out images, and all results."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from mflow_kernels.data.batches import OrderedBatches, images_and_classes
from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.files import write_atomically
from mflow_kernels.data.generators import Stream, stream_generator
from mflow_kernels.data.manifest import MANIFEST, TEST
from mflow_kernels.data.printable import printable
from mflow_kernels.data.progress import progress_bar
from mflow_kernels.data.splits import ImageSet, load_evaluation_set, load_splits
from mflow_kernels.evaluation.classes import class_log_probs, context_of
from mflow_kernels.evaluation.features import QUALITY_HEADINGS, SampleQuality
from mflow_kernels.models import HierarchicalFlow, ManifoldFlow
from mflow_kernels.models.bits import bits_per_dimension
from mflow_kernels.runs.folder import Trained, read_manifest

PARTS_EXPLAINED = (
    "Bits per dimension are the bits of a colour value minus the two log-densities and the "
    "log-determinant."
)


@dataclass(frozen=True)
class StageMetrics:
    """Means over the images, for the model up to and including one stage.

    bits_per_dim = n_bits - (on_manifold + off_manifold + logdet). These three parts are the two
    log-densities and the log-determinant, in bits per dimension. mean_squared_error compares the
    images with their projections, clipped to the range of images, on the [0, 1] scale. psnr is
    computed from that mean, in dB.
    """

    bits_per_dim: float
    on_manifold: float
    off_manifold: float
    logdet: float
    mean_squared_error: float
    psnr: float


@dataclass(frozen=True)
class Evaluation:
    """Metrics of stage 1 alone, of stages 1 and 2, and so on, in `stages`, and of samples of all
    stages at several temperatures."""

    data: str
    images: int
    manifold_dims: tuple[int, ...]
    stages: tuple[StageMetrics, ...]
    class_accuracy: float | None = None  # None without a class-conditional model or known classes
    samples: tuple[SampleQuality, ...] = ()  # empty without a network of features

    def write(self, path: Path) -> None:
        """Write a JSON file."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text))

    def rows(self) -> list[tuple[str, list[str]]]:
        """Return, for each metric, a label and one formatted number per stage."""
        formats = {
            "bits per dimension (bits/dim)": ("bits_per_dim", ".4f"),
            "  log-density on the manifold, bits/dim": ("on_manifold", "+.4f"),
            "  log-density off the manifold, bits/dim": ("off_manifold", "+.4f"),
            "  log-determinant, bits/dim": ("logdet", "+.4f"),
            "projection: MSE, pixels in [0, 1]": ("mean_squared_error", ".5f"),
            "projection: PSNR, dB": ("psnr", ".2f"),
        }
        return [
            (label, [format(getattr(stage, name), form) for stage in self.stages])
            for label, (name, form) in formats.items()
        ]

    def headings(self) -> list[str]:
        """Return a heading for each stage: the stages it covers and the manifold's dimension."""
        return [
            f"{'stage 1' if number == 1 else f'stages 1-{number}'}\n{dim} dimensions"
            for number, dim in enumerate(self.manifold_dims, start=1)
        ]

    def print(self) -> None:
        """Print a table to stdout."""
        title = f"Evaluation on {self.images:,} images of {self.data}"
        _print_table(title, ["", *self.headings()], ([name, *cells] for name, cells in self.rows()))
        print(PARTS_EXPLAINED)
        if self.class_accuracy is not None:
            print(self.accuracy_explained())

    def print_samples(self) -> None:
        """Print a table of the samples' metrics to stdout."""
        title = f"Samples, by features of {self.samples[0].network}"
        _print_table(title, QUALITY_HEADINGS, (row.cells() for row in self.samples))

    def accuracy_explained(self) -> str:
        """Return a sentence about the accuracy of the class posterior."""
        return (
            f"The class of the highest posterior is right for {self.class_accuracy:.1%} of the "
            "images (Bayes' rule with equal priors, all stages)."
        )


def _print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(title=escape(printable(title)))
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@torch.no_grad()
def evaluate_model(
    model: HierarchicalFlow, images: ImageSet, n_bits: int, *, data: str
) -> Evaluation:
    """Evaluate a model, in evaluation mode, on a set of images.

    The dequantization noise is seeded, so the same images give the same metrics. `n_bits` are the
    bits of each colour channel that the model was trained on, and `data` names the images.

    Raises:
        ValueError: the images have another shape than the model's.
    """
    check_image_shape(images, model)
    stages = cast(list[ManifoldFlow], list(model.stages))
    dims = math.prod(images.image_shape)
    sums = torch.zeros(len(stages), 4, dtype=torch.float64)
    right = None  # number of images whose class the posterior finds
    for levels, classes, generator in _batches("evaluating", model, images):
        x = dequantize(levels, n_bits, generator)
        context = context_of(model, x, classes)
        if context is not None and classes is not None:
            right = (right or 0) + int((class_log_probs(model, x).argmax(1) == context).sum())
        sums += stage_sums(model, x, context).cpu()
    means = sums / len(images)
    metrics = []
    for on, off, volume, squared in means.tolist():
        total = torch.tensor(on + off + volume, dtype=torch.float64)
        bits = bits_per_dimension(total, dims, n_bits).item()
        scale = 1 / (dims * math.log(2.0))
        psnr = -10 * math.log10(squared) if squared else math.inf
        metrics.append(StageMetrics(bits, on * scale, off * scale, volume * scale, squared, psnr))
    manifold_dims = tuple(stage.manifold_dim for stage in stages)
    accuracy = None if right is None else right / len(images)
    return Evaluation(data, len(images), manifold_dims, tuple(metrics), accuracy)


def stage_sums(model: HierarchicalFlow, x: Tensor, context: Tensor | None) -> Tensor:
    """Return sums over a batch x (N, C, H, W), (stages, 4) in float64.

    They are log p of u; the log-density outside of the manifolds and the log-determinant of this
    stage and those before it, together; and the mean squared error of the projection.
    """
    sums = []
    u, outside, logdet = x, x.new_zeros(len(x)), x.new_zeros(len(x))
    for index, stage in enumerate(cast(list[ManifoldFlow], list(model.stages))):
        terms = stage.terms(u, context=context)
        u = stage.encode(u, context=context)
        outside = outside + terms.off_manifold
        logdet = logdet + terms.logdet
        projected = model.decode(u, stages=index + 1, context=context)
        squared = (projected.clamp(-0.5, 0.5) - x).square().flatten(1).mean(1)
        parts = terms.on_manifold, outside, logdet, squared
        sums.append(torch.stack([part.double().sum() for part in parts]))
    return torch.stack(sums)


def evaluation_batch_size(image_shape: tuple[int, ...]) -> int:
    """Return the number of images in a batch: 100, or fewer if the images are large.

    The hidden channels of the widest networks then take at most a few GB.
    """
    return max(1, min(100, 2**22 // math.prod(image_shape)))


def _batches(
    what: str, model: HierarchicalFlow, images: ImageSet
) -> Iterator[tuple[Tensor, Tensor | None, torch.Generator]]:
    """Yield all images in order, in batches on the model's device, under a progress bar: their
    levels, their classes and the generator of their noise."""
    device, done = next(model.parameters()).device, 0
    with progress_bar(what, len(images)) as progress:
        batches = OrderedBatches(images, evaluation_batch_size(images.image_shape))
        for number, (levels, classes) in enumerate(map(images_and_classes, batches)):
            noise = stream_generator(0, Stream.EVALUATION_NOISE, number, device=device)
            yield levels.to(device), classes, noise
            done += len(levels)
            progress(done)


@torch.no_grad()
def importance_weighted_bits(
    model: HierarchicalFlow, images: ImageSet, n_bits: int, draws: int
) -> float:
    """Return the bits per dimension from several dequantizations of each image.

    This averages -log2 of (1 / K) sum_k p(x + u_k) over the images, for K `draws` of the noise. It
    bounds the probability of an image more tightly than the mean of the log-densities, which
    `evaluate_model` reports (Burda et al., arXiv 1509.00519; Ho et al., arXiv 1902.00275, section
    3.1). The first draw is the one that `evaluate_model` makes, so the two agree for K = 1.
    """
    dims = math.prod(images.image_shape)
    total = torch.zeros((), dtype=torch.float64)
    for levels, classes, generator in _batches("importance weights", model, images):
        each = []
        for _ in range(draws):
            x = dequantize(levels, n_bits, generator)
            classes = context_of(model, x, classes)  # the first draw decides unknown classes
            each.append(model.log_prob(x, context=classes))
        log_mean = torch.stack(each).double().logsumexp(0) - math.log(draws)
        total += log_mean.sum().cpu()
    return bits_per_dimension(total / len(images), dims, n_bits).item()


class EvaluatedImages(NamedTuple):
    """Images to evaluate a run on."""

    images: ImageSet
    name: str  # shown with the results
    skipped: tuple[str, ...]  # names of files that could not be read as images
    warning: str | None  # why the run may have been trained on some of these images
    held_out: bool  # True for images that the run held out, False for images of other data
    source: str  # where they come from, as `load_splits` takes it


def held_out_images(run: Trained, data: str | None) -> EvaluatedImages:
    """Find the images to evaluate a model on.

    Args:
        run: a trained run, or an export, which needs `data`.
        data: a folder, zip or prepared file of other images. All of them are used, except that
            CelebA contributes its test part only. None, or the run's own data, selects the images
            that the run held out; if that data set has changed since, they are found by name.

    Raises:
        ValueError: there are no images, none is left that the run held out, or the images do not
            have the model's shape.
    """
    recorded, config = read_manifest(run.folder), run.config
    warning = None
    if recorded is None:
        warning = f"{run.folder} has no {MANIFEST}: the model may have been trained on these images"
    if data is not None and config and config.data in (data, str(Path(data).resolve())):
        data = None
    if data is not None:
        source, name = data, Path(data).resolve().name
        images, skipped, manifest = load_evaluation_set(data, run.model.input_shape[1])
        trained_on = int(manifest.trained_on(recorded).sum()) if recorded else 0
        if trained_on:
            warning = f"the run was trained on {trained_on:,} of the {len(images):,} images"
    elif config is None:
        raise ValueError(
            f"data: expected images, because {run.folder} is an export, which does not say which "
            "images were held out, got none"
        )
    else:
        source, name = config.data, config.data_name
        splits = load_splits(config.data, config.image_size, config.classes)
        images, skipped = splits.test, splits.skipped
        different = splits.manifest.difference(recorded) if recorded else None
        if recorded and different:
            images = splits.held_out_by(recorded)
            count = int((recorded.parts == TEST).sum())
            warning = (
                f"since the run was trained, its data has changed: {different}; using "
                f"{len(images):,} of the {count:,} images that the run held out"
            )
    check_image_shape(images, run.model)
    return EvaluatedImages(images, name, skipped, warning, data is None, source)


def check_image_shape(images: ImageSet, model: HierarchicalFlow, argument: str = "data") -> None:
    """Raise ValueError unless the images have the shape that the model was made for.

    The message names a wrong number of channels first.
    """
    expected, given = model.input_shape, images.image_shape
    if given[0] != expected[0]:
        raise ValueError(
            f"{argument}: expected images with {expected[0]} colour channels, got {given[0]}"
            if expected[0] > 1
            else f"{argument}: expected grey images, got {given[0]} colour channels"
        )
    if given != expected:
        raise ValueError(f"{argument}: expected images of shape {expected}, got {given}")
