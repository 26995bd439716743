"""The report of a run: its metrics and pictures on one HTML page."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.files import write_atomically
from mflow_kernels.data.generators import Stream, stream_generator
from mflow_kernels.data.printable import printable
from mflow_kernels.data.progress import progress_bar
from mflow_kernels.data.splits import ImageSet, load_splits
from mflow_kernels.evaluation.classes import context_of
from mflow_kernels.evaluation.likelihood import Evaluation, importance_weighted_bits
from mflow_kernels.evaluation.metrics import ReportMetrics
from mflow_kernels.evaluation.ood import (
    DENSITY_BATCH,
    SCORED_IMAGES,
    TrainingScores,
    compare_sets,
    density_images,
    density_method,
    made_up_sets,
    score_images,
    training_scores,
)
from mflow_kernels.evaluation.page import page
from mflow_kernels.evaluation.report_pictures import draw_report
from mflow_kernels.evaluation.samples import TEMPERATURES
from mflow_kernels.models import ManifoldFlow
from mflow_kernels.models.selection import IntrinsicDimension, estimate_intrinsic_dimension
from mflow_kernels.runs.folder import Trained, read_manifest

REPORT, FIGURES = "report.html", "figures.json"
_SPECTRUM_IMAGES = 4
_SPECTRUM_DIMENSIONS = 1024  # largest D: each image needs a D x D Jacobian
_PROBES, _ITERATIONS = 16, 64  # defaults of `manifold_log_prob`, by Hutchinson's method


@dataclass(frozen=True)
class ReportOptions:
    """Options of a report.

    Args:
        draws: dequantizations of each image for the importance-weighted bits per dimension; 1
            leaves these out.
        compared: number of images, and of samples at each temperature, that `sample_quality`
            compares.
        others: further sets of images, by name, that get OOD scores.
        quick: leave out the parts that need Jacobians: the density on the manifold, the OOD score
            and the intrinsic dimension.
        ambient: also draw the off-manifold coordinates of samples.
        held_out: whether the evaluated images are those that the run held out.
        warning: why the model may have been trained on some of the images; None if it was not.
    """

    draws: int = 1
    compared: int = 0
    others: tuple[tuple[str, ImageSet], ...] = ()
    quick: bool = False
    ambient: bool = False
    held_out: bool = True
    warning: str | None = None


def describe_work(run: Trained, images: ImageSet, options: ReportOptions) -> str:
    """Describe what an evaluation will compute, with the number of passes that each part takes.

    In a pass, one image, or its derivative in one direction, goes once through the image flow.
    """
    model = run.model
    count, stages = len(images), len(model.stages)
    others = [len(other) for _, other in options.others]
    # The evaluated images, their negatives and uniform noise, then the other sets.
    scored = sum(min(SCORED_IMAGES, number) for number in (count, count, count, *others))
    # The projection of each stage takes a pass, and so do terms, encoding and penalty of stage 1.
    lines = [_work(f"likelihood and reconstruction of {count:,} images", count * (stages + 3))]
    if options.draws > 1:
        lines.append(_work(f"{options.draws} dequantizations of each", count * options.draws))
    if options.compared:
        samples = len(TEMPERATURES) * min(options.compared, count)
        lines.append(_work(f"{samples:,} samples for FID, KID, precision and recall", samples))
    lines.append(_work(f"scores of {scored:,} images of all sets", 3 * scored))
    what = f"up to {SCORED_IMAGES} training images to compare with"
    lines.append(_work(what, 3 * SCORED_IMAGES, "at most "))
    dense = density_images(model)
    if dense and not options.quick:
        method = density_method(model)
        # The same sets for the OOD score, and the evaluated images once more.
        measured = sum(min(dense, number) for number in (count, count, count, count, *others))
        passes = model.manifold_dim if method == "exact" else 2 * _PROBES * _ITERATIONS
        most = "" if method == "exact" else "at most "
        what = f"density on the manifold at {measured:,} images ({method})"
        lines.append(_work(what, measured * passes, most))
        # The sets of the OOD score, and training images.
        measured += min(dense, SCORED_IMAGES) - min(dense, count)
        what = f"local dimension at {measured:,} images ({method})"
        lines.append(_work(what, measured * passes, "at most "))
    if _why_no_spectrum(run) is None and not options.quick:
        dims = math.prod(model.input_shape)
        lines.append(_work("intrinsic dimension", min(_SPECTRUM_IMAGES, count) * dims))
    if options.quick:
        lines.append(
            "  left out by --quick: density on the manifold, OOD score, local dimension, intrinsic "
            "dimension"
        )
    return "\n".join(["evaluation, with the passes of an image through the image flow:", *lines])


def _work(what: str, passes: int, most: str = "") -> str:
    return f"  {what}: {most}{passes:,} passes"


def write_report(
    run: Trained, images: ImageSet, evaluation: Evaluation, folder: Path, options: ReportOptions
) -> Path:
    """Compute the rest of a report's metrics, draw its pictures and write its folder.

    The folder is created if needed, and gets the pictures, FIGURES and, last, the page REPORT,
    whose path is returned. Each file is whole or absent. `run` may be an export; `evaluation` is
    that of `images`.
    """
    missing: list[str] = []
    model, n_bits = run.model, run.n_bits
    weighted = None
    if options.draws > 1:
        weighted = importance_weighted_bits(model, images, n_bits, options.draws)
    if not evaluation.samples:
        missing.append(
            "FID, KID, precision and recall: they need a file with a network's weights; give it to "
            "mflow evaluate as --feature-weights FILE"
        )
    density = spectrum = None
    if options.quick:
        missing.append(
            "OOD score, density on the manifold, local and intrinsic dimension: left out by --quick"
        )
    else:
        if not density_images(model):
            missing.append("OOD score and local dimension: an image needs too large a Jacobian")
        density = _manifold_log_prob(run, images, missing)
        spectrum = _spectrum(run, images, missing)
    training = _training_scores(run, missing, options.quick)
    others = f"images of {printable(evaluation.data)}"
    name, kind = ("held out", "held-out images") if options.held_out else (others, others)
    scores = _score_sets(run, images, name, options, training)
    metrics = ReportMetrics(
        run=run.folder.resolve().name,
        evaluation=evaluation,
        draws=options.draws,
        importance_weighted_bits_per_dim=weighted,
        scores=compare_sets(scores),
        deviation=training.deviation if training else None,
        manifold_log_prob=density,
        density_images=min(density_images(model), len(images)),
        density_method=density_method(model),
        spectrum=spectrum,
        missing=tuple(missing),
        warning=options.warning,
    )
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_report(run, images, kind, folder, scores, spectrum, options.ambient)
    text = metrics.to_json()
    write_atomically(folder / FIGURES, lambda path: path.write_text(text))
    html = page(metrics, images.image_shape, run.config, pictures)
    # Names of files may have bytes that are not UTF-8.
    content = html.encode(errors="backslashreplace")
    write_atomically(folder / REPORT, lambda path: path.write_bytes(content))
    return folder / REPORT


def _training_scores(run: Trained, missing: list[str], quick: bool) -> TrainingScores | None:
    without = "typicality, latent score, OOD score and local dimension: "
    if run.config is None:
        missing.append(f"{without}an export does not say which images the model was trained on")
        return None
    try:
        splits = load_splits(run.config.data, run.config.image_size)
        recorded = read_manifest(run.folder)
        train = splits.train if recorded is None else splits.trained_on_by(recorded)
    except ValueError as error:
        missing.append(f"{without}the images that the run was trained on cannot be read ({error})")
        return None
    batch = train.first(SCORED_IMAGES)
    if quick:
        return training_scores(run.model, batch, run.n_bits)
    count = min(len(batch), density_images(run.model))
    with progress_bar("local dimension of training images", count) as progress:
        return training_scores(run.model, batch, run.n_bits, progress)


def _score_sets(
    run: Trained,
    images: ImageSet,
    title: str,
    options: ReportOptions,
    training: TrainingScores | None,
) -> dict[str, dict[str, Tensor]]:
    batch = images.first(SCORED_IMAGES)
    sets = {title: batch, **made_up_sets(batch)}
    for name, other in options.others:
        sets[f"{name} (--ood)" if name in sets else name] = other.first(SCORED_IMAGES)
    scores, done = {}, 0
    most = density_images(run.model) if training and not options.quick else 0
    counts = {name: min(most, len(batch)) for name, batch in sets.items()}
    with progress_bar("OOD scores", sum(counts.values())) as progress:
        for name, batch in sets.items():

            def add(count: int, before: int = done) -> None:
                progress(before + count)

            how = None if options.quick else add
            scores[name] = score_images(run.model, batch, run.n_bits, training, how)
            done += counts[name]
    return scores


@torch.no_grad()
def _manifold_log_prob(run: Trained, images: ImageSet, missing: list[str]) -> float | None:
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
def _spectrum(run: Trained, images: ImageSet, missing: list[str]) -> IntrinsicDimension | None:
    reason = _why_no_spectrum(run)
    if reason is not None:
        missing.append(f"intrinsic dimension: {reason}")
        return None
    stage = cast(ManifoldFlow, run.model.stages[0])
    return estimate_intrinsic_dimension(stage, _dequantized(run, images, _SPECTRUM_IMAGES))


def _why_no_spectrum(run: Trained) -> str | None:
    """Return why a report has no intrinsic dimension of this run; None if it has one."""
    dims = math.prod(run.model.input_shape)
    if run.model.class_names:
        return "it is not computed for class-conditional models"
    if cast(ManifoldFlow, run.model.stages[0]).objective.domain != "data":
        return "it can only be estimated from flows trained with --domain data"
    if dims > _SPECTRUM_DIMENSIONS:
        most = f"{_SPECTRUM_DIMENSIONS:,}"
        return f"its spectrum is too expensive at {dims:,} dimensions (at most {most})"
    return None


def _dequantized(run: Trained, images: ImageSet, count: int) -> Tensor:
    """Return the first `count` images, dequantized with a fixed seed."""
    generator = stream_generator(0, Stream.REPORT_NOISE, device=run.device)
    batch = images.first(count).to(run.device)
    return dequantize(batch, run.n_bits, generator)
