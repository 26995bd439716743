"""The report of a run: every figure and picture of it, as one page that a browser opens."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mflow_kernels.data.dequantization import dequantize, to_image
from mflow_kernels.data.files import write_atomically
from mflow_kernels.data.generators import Stream, stream_generator
from mflow_kernels.data.progress import progress_bar
from mflow_kernels.data.splits import ImageSet, load_splits
from mflow_kernels.evaluation.features import FeatureDistance, FeatureNetwork, feature_distance
from mflow_kernels.evaluation.likelihood import Evaluation, batch_of, importance_weighted_bits
from mflow_kernels.evaluation.ood import (
    DENSITY_BATCH,
    SCORED_IMAGES,
    SetScores,
    compare,
    density_images,
    density_method,
    made_up_sets,
    score,
)
from mflow_kernels.evaluation.page import Picture, page
from mflow_kernels.evaluation.pictures import (
    draw_histograms,
    draw_images,
    draw_residuals,
    draw_spectrum,
)
from mflow_kernels.evaluation.samples import TEMPERATURES, draw_samples, project_images
from mflow_kernels.models import HierarchicalFlow, ManifoldFlow
from mflow_kernels.models.selection import IntrinsicDimension, estimate_intrinsic_dimension
from mflow_kernels.runs.folder import Run

REPORT, FIGURES = "report.html", "figures.json"
_COLUMNS = 12
_SPECTRUM_IMAGES = 4
_SPECTRUM_DIMENSIONS = 1024  # at most: a D x D Jacobian for each image
_FEATURE_BATCH = 50


@dataclass(frozen=True)
class Asked:
    """What a report is to hold beyond what costs little.

    Args:
        draws: dequantizations of each image for the importance-weighted bits per dimension; 1 for
            none of it.
        features: the network's name and itself, for FID and KID; None for none of them.
        feature_images: of each set, at most.
        others: named sets of images that the model was not made for.
    """

    draws: int = 1
    features: tuple[str, FeatureNetwork] | None = None
    feature_images: int = 10_000
    others: tuple[tuple[str, ImageSet], ...] = ()


@dataclass(frozen=True)
class SampleQuality:
    """Samples at one temperature against held-out images; `images` of each."""

    temperature: float
    network: str
    images: int
    distance: FeatureDistance


@dataclass(frozen=True)
class Figures:
    """All figures of a report; None for what was not computed, which `missing` explains.

    deviation is of the training images (`Chart.deviation`); manifold_log_prob the mean over
    `density_images` held-out images, nats.
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
        """As text, the spectrum as a list; what is not finite as null."""
        values = asdict(self)
        if self.spectrum is not None:
            values["spectrum"] = {**self.spectrum._asdict()}
            values["spectrum"]["spectrum"] = self.spectrum.spectrum.tolist()
        return json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"


def write_report(
    run: Run, images: ImageSet, evaluation: Evaluation, folder: Path, asked: Asked
) -> Path:
    """Compute what `evaluation` lacks, draw, and write a report's folder: pictures, FIGURES, and
    last REPORT, which holds all of them. Each file is whole or absent.

    Args:
        run: a trained run.
        images: what `evaluation` was computed on.
        evaluation: by `evaluate_model`.
        folder: is made if it is not there.
        asked: what more to compute.

    Returns:
        The path of REPORT.
    """
    missing: list[str] = []
    model, n_bits = run.model, run.config.n_bits
    weighted = None
    if asked.draws > 1:
        weighted = importance_weighted_bits(model, images, n_bits, asked.draws, device=run.device)
    samples = _sample_quality(run, images, asked)
    if not samples:
        missing.append(
            "FID and KID: they need a network's weights from a file on this machine, which "
            "mflow evaluate takes as --feature-weights FILE"
        )
    deviation = _deviation(run, missing)
    scores = _score_sets(run, images, asked, deviation)
    density = _manifold_log_prob(run, images, missing)
    spectrum = _spectrum(run, images, missing)
    figures = Figures(
        run=run.folder.resolve().name,
        evaluation=evaluation,
        draws=asked.draws,
        importance_weighted_bits_per_dim=weighted,
        samples=samples,
        scores=compare(scores),
        deviation=deviation,
        manifold_log_prob=density,
        density_images=min(density_images(model), len(images)),
        density_method=density_method(model),
        spectrum=spectrum,
        missing=tuple(missing),
    )
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _draw(run, images, folder, scores, spectrum)
    text = figures.to_json()
    write_atomically(folder / FIGURES, lambda path: path.write_text(text))
    html = page(figures, run.config, pictures)
    write_atomically(folder / REPORT, lambda path: path.write_text(html, encoding="utf-8"))
    return folder / REPORT


@torch.no_grad()
def _sample_quality(run: Run, images: ImageSet, asked: Asked) -> tuple[SampleQuality, ...]:
    if asked.features is None:
        return ()
    name, network = asked.features
    network = network.to(run.device)
    count = min(asked.feature_images, len(images))
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

        real = extract(_first(images, count))
        for temperature in TEMPERATURES:
            fake = extract(_samples(run.model, count, temperature))
            distance = feature_distance(real, fake)
            rows.append(SampleQuality(temperature, name, count, distance))
    return tuple(rows)


def _first(images: ImageSet, count: int) -> Iterator[Tensor]:
    for begin in range(0, count, _FEATURE_BATCH):
        yield images.batch(range(begin, min(begin + _FEATURE_BATCH, count)))


def _samples(model: HierarchicalFlow, count: int, temperature: float) -> Iterator[Tensor]:
    """As uint8, as they would be written into files. Of the same u at each temperature."""
    device = next(model.parameters()).device
    generator = stream_generator(0, Stream.REPORT_SAMPLES, device=device)
    for begin in range(0, count, _FEATURE_BATCH):
        number = min(_FEATURE_BATCH, count - begin)
        yield to_image(model.sample(number, temperature=temperature, generator=generator))


def _deviation(run: Run, missing: list[str]) -> float | None:
    try:
        train = load_splits(run.config.data, run.config.image_size).train
    except ValueError as error:
        missing.append(f"OOD score: it needs the images that the run was trained on ({error})")
        return None
    if not density_images(run.model):
        missing.append("OOD score: the density on the manifold costs too much at this size")
        return None
    parts = _some(run, train, SCORED_IMAGES).split(batch_of(train.image_shape))
    squares = sum(len(part) * run.model.deviation(part) ** 2 for part in parts)
    return math.sqrt(squares / sum(map(len, parts)))


def _score_sets(
    run: Run, images: ImageSet, asked: Asked, deviation: float | None
) -> dict[str, dict[str, Tensor]]:
    held_out = images.batch(range(min(SCORED_IMAGES, len(images))))
    sets = {"held out": held_out, **made_up_sets(held_out)}
    for name, other in asked.others:
        sets[name] = other.batch(range(min(SCORED_IMAGES, len(other))))
    scores, done = {}, 0
    each = density_images(run.model) if deviation else 0
    with progress_bar(
        "OOD scores", sum(min(each, len(some)) for some in sets.values())
    ) as progress:
        for name, some in sets.items():

            def own(count: int, before: int = done) -> None:
                progress(before + count)

            scores[name] = score(run.model, some, run.config.n_bits, deviation, own)
            done += min(each, len(some))
    return scores


@torch.no_grad()
def _manifold_log_prob(run: Run, images: ImageSet, missing: list[str]) -> float | None:
    count = density_images(run.model)
    if not count:
        missing.append("density on the manifold: it costs too much at this size")
        return None
    generator = stream_generator(0, Stream.REPORT_NOISE, 1, device=run.device)
    method, values = density_method(run.model), []
    with progress_bar("density on the manifold", min(count, len(images))) as progress:
        for part in _some(run, images, count).split(DENSITY_BATCH):
            found = run.model.manifold_log_prob(part, method=method, generator=generator)
            values.append(found.value.double())
            progress(sum(map(len, values)))
    return torch.cat(values).mean().item()


@torch.no_grad()
def _spectrum(run: Run, images: ImageSet, missing: list[str]) -> IntrinsicDimension | None:
    dims = math.prod(run.model.input_shape)
    stage = run.model.stages[0]
    assert isinstance(stage, ManifoldFlow)
    if stage.objective.domain != "data":
        missing.append("intrinsic dimension: its spectrum is read from flows of the data domain")
    elif dims > _SPECTRUM_DIMENSIONS:
        missing.append(
            f"intrinsic dimension: its spectrum costs too much at {dims:,} dimensions, more than "
            f"{_SPECTRUM_DIMENSIONS:,}"
        )
    else:
        return estimate_intrinsic_dimension(stage.flow, _some(run, images, _SPECTRUM_IMAGES))
    return None


def _some(run: Run, images: ImageSet, count: int) -> Tensor:
    """The first images, dequantized."""
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
    """Everything to be seen, by the section of the page that it belongs to."""
    pictures = {}
    model, seed = run.model, run.config.seed
    path = folder / "samples.png"
    rows = {f"T = {t}": draw_samples(model, _COLUMNS, t, seed) for t in TEMPERATURES}
    draw_images(path, "Samples on the manifold at several temperatures", rows)
    pictures["samples"] = Picture(path, "The same draws at each temperature T, scaled by it.")

    originals = images.batch(range(min(_COLUMNS, len(images))))
    path = folder / "projections.png"
    draw_residuals(
        path,
        f"Held-out images and their projections on {model.manifold_dim} dimensions",
        originals,
        project_images(model, originals),
    )
    pictures["projections"] = Picture(path, "What the coordinates on the manifold keep of images.")

    if len(images) > 1:
        path = folder / "interpolations.png"
        draw_images(path, "Between two held-out images, along the manifold", _between(run, images))
        pictures["interpolations"] = Picture(
            path,
            "The first and last of each row are the images; between them, points on the "
            "manifold from the projection of one to that of the other, straight in u.",
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
    pictures["scores"] = Picture(path, "How many images of each set have which score.")
    if spectrum is not None:
        path = folder / "spectrum.png"
        draw_spectrum(path, spectrum)
        pictures["spectrum"] = Picture(path, "Singular values of the decoder's Jacobian.")
    curves = run.folder / "curves.png"
    if curves.is_file():
        pictures["curves"] = Picture(curves, "As mflow train drew it.")
    return pictures


def _between(run: Run, images: ImageSet) -> dict[str, Tensor]:
    count = min(6, len(images) // 2)
    rows = {}
    for row in range(count):
        first, last = images.batch([row]), images.batch([count + row])
        x0, x1 = ((end.to(run.device).float() + 0.5) / 256 - 0.5 for end in (first, last))
        points = to_image(run.model.interpolate(x0, x1, _COLUMNS - 2)[:, 0]).cpu()
        rows[f"pair {row + 1}"] = torch.cat([first, points, last])
    return rows


def _finite(value: object) -> object:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
