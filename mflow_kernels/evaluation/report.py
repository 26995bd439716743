"""The report of a run: its metrics and pictures on one HTML page."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mflow_kernels.data.dequantization import dequantize, to_image
from mflow_kernels.data.files import write_atomically
from mflow_kernels.data.generators import Stream, stream_generator
from mflow_kernels.data.progress import progress_bar
from mflow_kernels.data.splits import ImageSet, load_splits
from mflow_kernels.evaluation.classes import context_of, sampled_classes
from mflow_kernels.evaluation.features import FeatureDistance, FeatureNetwork, feature_distance
from mflow_kernels.evaluation.likelihood import (
    Evaluation,
    evaluation_batch_size,
    importance_weighted_bits,
)
from mflow_kernels.evaluation.ood import (
    DENSITY_BATCH,
    SCORED_IMAGES,
    SetScores,
    compare_sets,
    density_images,
    density_method,
    made_up_sets,
    score_images,
)
from mflow_kernels.evaluation.page import Picture, page
from mflow_kernels.evaluation.pictures import (
    COLUMNS,
    draw_histograms,
    draw_images,
    draw_residuals,
    draw_spectrum,
)
from mflow_kernels.evaluation.samples import (
    TEMPERATURES,
    bin_centres,
    project_images,
    samples_by_temperature,
)
from mflow_kernels.models import HierarchicalFlow, ManifoldFlow
from mflow_kernels.models.selection import IntrinsicDimension, estimate_intrinsic_dimension
from mflow_kernels.runs.folder import Run

REPORT, FIGURES = "report.html", "figures.json"
_SPECTRUM_IMAGES = 4
_SPECTRUM_DIMENSIONS = 1024  # largest D: each image needs a D x D Jacobian
_FEATURE_BATCH = 50
_PROBES, _ITERATIONS = 16, 64  # defaults of `manifold_log_prob`, by Hutchinson's method


@dataclass(frozen=True)
class ReportOptions:
    """Parts of a report that are computed on request only.

    Args:
        draws: dequantizations of each image for the importance-weighted bits per dimension, which
            1 leaves out.
        features: name of a network and the network, for FID and KID; None leaves them out.
        feature_images: most images and samples that FID and KID compare.
        others: further sets of images, by name, to compute OOD scores of.
        quick: leave out what needs Jacobians: the density on the manifold, the OOD score and the
            intrinsic dimension.
    """

    draws: int = 1
    features: tuple[str, FeatureNetwork] | None = None
    feature_images: int = 10_000
    others: tuple[tuple[str, ImageSet], ...] = ()
    quick: bool = False


@dataclass(frozen=True)
class SampleQuality:
    """Distance between `images` samples at one temperature and as many held-out images."""

    temperature: float
    network: str
    images: int
    distance: FeatureDistance


@dataclass(frozen=True)
class ReportMetrics:
    """All metrics of a report. A value is None if it was not computed; `missing` says why.

    `deviation` is that of the training images (`Chart.deviation`). `manifold_log_prob` is the mean
    over `density_images` held-out images, in nats.
    """

    run: str
    evaluation: Evaluation
    draws: int
    importance_weighted_bits_per_dim: float | None
    samples: tuple[SampleQuality, ...]
    scores: tuple[SetScores, ...]
    deviation: float | None
    manifold_log_prob: float | None
    density_images: int
    density_method: str
    spectrum: IntrinsicDimension | None
    missing: tuple[str, ...]

    def to_json(self) -> str:
        """Serialize as JSON. The spectrum becomes a list; numbers that are not finite, null."""
        values = asdict(self)
        if self.spectrum is not None:
            values["spectrum"] = {**self.spectrum._asdict()}
            values["spectrum"]["spectrum"] = self.spectrum.spectrum.tolist()
        return json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"


def describe_work(run: Run, images: ImageSet, options: ReportOptions) -> str:
    """What an evaluation will compute, with the number of passes that each part takes.

    In a pass, one image, or its derivative in one direction, goes once through the image flow.
    """
    model = run.model
    count, stages = len(images), len(model.stages)
    scored = sum(
        min(SCORED_IMAGES, number)
        for number in (count, count, count, *(len(other) for _, other in options.others))
    )
    # Each stage projects; its terms take a pass, its encoding another, and its penalty a third.
    lines = [_work(f"likelihood and reconstruction of {count:,} images", count * (2 * stages + 3))]
    if options.draws > 1:
        lines.append(_work(f"{options.draws} dequantizations of each", count * options.draws))
    if options.features is not None:
        compared = min(options.feature_images, count)
        samples = len(TEMPERATURES) * compared
        lines.append(_work(f"{samples:,} samples for FID and KID", samples))
    lines.append(_work(f"OOD scores of {scored:,} images", 3 * scored))
    dense = density_images(model)
    if dense and not options.quick:
        method = density_method(model)
        sets = (count, count, count, count, *(len(other) for _, other in options.others))
        measured = sum(min(dense, number) for number in sets)
        passes = model.manifold_dim if method == "exact" else 2 * _PROBES * _ITERATIONS
        most = "" if method == "exact" else "at most "
        what = f"density on the manifold at {measured:,} images ({method})"
        lines.append(_work(what, measured * passes, most))
    if _has_spectrum(run) and not options.quick:
        dims = math.prod(model.input_shape)
        lines.append(_work("intrinsic dimension", min(_SPECTRUM_IMAGES, count) * dims))
    if options.quick:
        lines.append("  left out by --quick: density on the manifold, intrinsic dimension")
    return "\n".join(["evaluation, with the passes of an image through the image flow:", *lines])


def _work(what: str, passes: int, most: str = "") -> str:
    return f"  {what}: {most}{passes:,} passes"


def write_report(
    run: Run, images: ImageSet, evaluation: Evaluation, folder: Path, options: ReportOptions
) -> Path:
    """Compute the rest of a report's metrics, draw its pictures and write its folder.

    The folder gets the pictures, FIGURES and, last, the page REPORT. Each file is written under a
    temporary name first, so it is whole or absent.

    Args:
        run: a trained run.
        images: the images that `evaluation` was computed on.
        evaluation: result of `evaluate_model`.
        folder: folder to write; it is created if needed.
        options: further parts to compute.

    Returns:
        The path of REPORT.
    """
    missing: list[str] = []
    model, n_bits = run.model, run.config.n_bits
    weighted = None
    if options.draws > 1:
        weighted = importance_weighted_bits(model, images, n_bits, options.draws, device=run.device)
    samples = _sample_quality(run, images, options)
    if not samples:
        missing.append(
            "FID and KID: they need a file with a network's weights; give it to mflow evaluate as "
            "--feature-weights FILE"
        )
    deviation = density = spectrum = None
    if options.quick:
        missing.append(
            "OOD score, density on the manifold and intrinsic dimension: left out by --quick"
        )
    else:
        deviation = _deviation(run, missing)
        density = _manifold_log_prob(run, images, missing)
        spectrum = _spectrum(run, images, missing)
    scores = _score_sets(run, images, options, deviation)
    metrics = ReportMetrics(
        run=run.folder.resolve().name,
        evaluation=evaluation,
        draws=options.draws,
        importance_weighted_bits_per_dim=weighted,
        samples=samples,
        scores=compare_sets(scores),
        deviation=deviation,
        manifold_log_prob=density,
        density_images=min(density_images(model), len(images)),
        density_method=density_method(model),
        spectrum=spectrum,
        missing=tuple(missing),
    )
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _draw(run, images, folder, scores, spectrum)
    text = metrics.to_json()
    write_atomically(folder / FIGURES, lambda path: path.write_text(text))
    html = page(metrics, run.config, pictures)
    write_atomically(folder / REPORT, lambda path: path.write_text(html, encoding="utf-8"))
    return folder / REPORT


@torch.no_grad()
def _sample_quality(
    run: Run, images: ImageSet, options: ReportOptions
) -> tuple[SampleQuality, ...]:
    if options.features is None:
        return ()
    name, network = options.features
    network = network.to(run.device)
    count = min(options.feature_images, len(images))
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

        real = extract(_image_batches(images, count))
        for temperature in TEMPERATURES:
            fake = extract(_sample_batches(run.model, count, temperature))
            distance = feature_distance(real, fake)
            rows.append(SampleQuality(temperature, name, count, distance))
    return tuple(rows)


def _image_batches(images: ImageSet, count: int) -> Iterator[Tensor]:
    for begin in range(0, count, _FEATURE_BATCH):
        yield images.batch(range(begin, min(begin + _FEATURE_BATCH, count)))


def _sample_batches(model: HierarchicalFlow, count: int, temperature: float) -> Iterator[Tensor]:
    """Yield uint8 samples, as a file would hold them, from the same draws at each temperature."""
    device = next(model.parameters()).device
    generator = stream_generator(0, Stream.REPORT_SAMPLES, device=device)
    for begin in range(0, count, _FEATURE_BATCH):
        number = min(_FEATURE_BATCH, count - begin)
        context = sampled_classes(model, number)
        yield to_image(
            model.sample(number, temperature=temperature, generator=generator, context=context)
        )


def _deviation(run: Run, missing: list[str]) -> float | None:
    try:
        train = load_splits(run.config.data, run.config.image_size).train
    except ValueError as error:
        missing.append(
            f"OOD score: the images that the run was trained on cannot be read ({error})"
        )
        return None
    if not density_images(run.model):
        missing.append("OOD score: the density on the manifold is too expensive at this image size")
        return None
    parts = _dequantized(run, train, SCORED_IMAGES).split(evaluation_batch_size(train.image_shape))
    squares = sum(
        len(part) * run.model.deviation(part, context=context_of(run.model, part)) ** 2
        for part in parts
    )
    return math.sqrt(squares / sum(map(len, parts)))


def _score_sets(
    run: Run, images: ImageSet, options: ReportOptions, deviation: float | None
) -> dict[str, dict[str, Tensor]]:
    held_out = images.batch(range(min(SCORED_IMAGES, len(images))))
    sets = {"held out": held_out, **made_up_sets(held_out)}
    for name, other in options.others:
        sets[name] = other.batch(range(min(SCORED_IMAGES, len(other))))
    scores, done = {}, 0
    most = density_images(run.model) if deviation else 0
    counts = {name: min(most, len(batch)) for name, batch in sets.items()}
    with progress_bar("OOD scores", sum(counts.values())) as progress:
        for name, batch in sets.items():

            def add(count: int, before: int = done) -> None:
                progress(before + count)

            scores[name] = score_images(run.model, batch, run.config.n_bits, deviation, add)
            done += counts[name]
    return scores


@torch.no_grad()
def _manifold_log_prob(run: Run, images: ImageSet, missing: list[str]) -> float | None:
    count = density_images(run.model)
    if not count:
        missing.append("density on the manifold: it is too expensive at this image size")
        return None
    generator = stream_generator(0, Stream.REPORT_NOISE, 1, device=run.device)
    method, values = density_method(run.model), []
    with progress_bar("density on the manifold", min(count, len(images))) as progress:
        for part in _dequantized(run, images, count).split(DENSITY_BATCH):
            found = run.model.manifold_log_prob(
                part, context=context_of(run.model, part), method=method, generator=generator
            )
            values.append(found.value.double())
            progress(sum(map(len, values)))
    return torch.cat(values).mean().item()


@torch.no_grad()
def _spectrum(run: Run, images: ImageSet, missing: list[str]) -> IntrinsicDimension | None:
    dims = math.prod(run.model.input_shape)
    if run.model.class_names:
        missing.append("intrinsic dimension: it is not computed for class-conditional models")
        return None
    if _has_spectrum(run):
        stage = cast(ManifoldFlow, run.model.stages[0])
        return estimate_intrinsic_dimension(stage.flow, _dequantized(run, images, _SPECTRUM_IMAGES))
    if run.config.domain != "data":
        missing.append(
            "intrinsic dimension: it can only be estimated from flows trained with --domain data"
        )
    else:
        missing.append(
            f"intrinsic dimension: its spectrum is too expensive at {dims:,} dimensions (at most "
            f"{_SPECTRUM_DIMENSIONS:,})"
        )
    return None


def _has_spectrum(run: Run) -> bool:
    dims = math.prod(run.model.input_shape)
    conditional = bool(run.model.class_names)
    return run.config.domain == "data" and dims <= _SPECTRUM_DIMENSIONS and not conditional


def _dequantized(run: Run, images: ImageSet, count: int) -> Tensor:
    """The first `count` images, dequantized with a fixed seed."""
    generator = stream_generator(0, Stream.REPORT_NOISE, device=run.device)
    batch = images.batch(range(min(count, len(images)))).to(run.device)
    return dequantize(batch, run.config.n_bits, generator)


@torch.no_grad()
def _draw(
    run: Run,
    images: ImageSet,
    folder: Path,
    scores: dict[str, dict[str, Tensor]],
    spectrum: IntrinsicDimension | None,
) -> dict[str, Picture]:
    """Draw the pictures of the page, by name."""
    pictures = {}
    model = run.model
    path = folder / "samples.png"
    draw_images(path, *samples_by_temperature(model, COLUMNS, run.config.seed))
    pictures["samples"] = Picture(
        path, "Each column decodes one draw, scaled by the temperature T of the row."
    )

    originals = images.batch(range(min(COLUMNS, len(images))))
    classes = None if images.classes is None else images.classes[: len(originals)]
    path = folder / "projections.png"
    draw_residuals(
        path,
        f"Held-out images and their projections on the {model.manifold_dim}-dimensional manifold",
        originals,
        project_images(
            model,
            originals,
            classes=classes,
        ),
    )
    pictures["projections"] = Picture(
        path, "The projection is what the manifold coordinates preserve of an image."
    )

    if len(images) > 1:
        path = folder / "interpolations.png"
        draw_images(
            path,
            "Interpolations on the manifold between held-out images",
            _interpolations(run, images),
        )
        pictures["interpolations"] = Picture(
            path,
            "Each row starts and ends with a held-out image. The images between them lie on the "
            "manifold, on a straight line in its coordinates u from one projection to the other.",
        )
    path = folder / "scores.png"
    labels = {"bits_per_dim": "bits per dimension", "distance": "distance from the manifold"}
    labels["ood_score"] = "OOD score (nats)"
    panels = {
        label: {name: own[key] for name, own in scores.items()}
        for key, label in labels.items()
        if key in next(iter(scores.values()))
    }
    draw_histograms(path, panels)
    pictures["scores"] = Picture(path, "Number of images of each set by score.")
    if spectrum is not None:
        path = folder / "spectrum.png"
        draw_spectrum(path, spectrum)
        pictures["spectrum"] = Picture(
            path, "Local standard deviations: singular values of the decoder's Jacobian."
        )
    curves = run.folder / "curves.png"
    if curves.is_file():
        pictures["curves"] = Picture(curves, "Drawn by mflow train at the end of training.")
    return pictures


def _interpolations(run: Run, images: ImageSet) -> dict[str, Tensor]:
    count = min(6, len(images) // 2)
    rows = {}
    for row in range(count):
        first, last = images.batch([row]), images.batch([count + row])
        x0, x1 = bin_centres(first, run.model), bin_centres(last, run.model)
        context = context_of(run.model, x0)  # the class of the first image
        points = run.model.interpolate(x0, x1, COLUMNS - 2, context=context)
        points = to_image(points[:, 0]).cpu()
        rows[f"pair {row + 1}"] = torch.cat([first, points, last])
    return rows


def _finite(value: object) -> object:
    """Replace numbers that are not finite by None, because JSON cannot hold them."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
