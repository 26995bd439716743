"""The report as one self-contained HTML page: it needs no network, script or other file."""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from mflow_kernels import __version__
from mflow_kernels.evaluation.features import QUALITY_HEADINGS, SampleQuality
from mflow_kernels.evaluation.likelihood import PARTS_EXPLAINED
from mflow_kernels.evaluation.metrics import ReportMetrics
from mflow_kernels.evaluation.ood import SCORES
from mflow_kernels.runs.config import RunConfig

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; border-bottom: 1px solid #ddd; }
p, figcaption { max-width: 46rem; }
figcaption, .note { color: #555; font-size: .9rem; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; border: 1px solid #eee; }
table { border-collapse: collapse; margin: .6rem 0; display: block; overflow-x: auto; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #eee;
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: pre-wrap; }
th { font-weight: 600; vertical-align: bottom; white-space: pre-line; }
@media (max-width: 40rem) { th, td { padding: .2rem .4rem; font-size: .85rem; } }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


class Picture(NamedTuple):
    path: Path  # PNG file
    caption: str


def page(
    metrics: ReportMetrics,
    image_shape: tuple[int, ...],
    config: RunConfig | None,
    pictures: Mapping[str, Picture],
) -> str:
    """Make the page.

    Args:
        metrics: the metrics to show.
        image_shape: (C, H, W).
        config: configuration of the run; None for an export.
        pictures: pictures by name. A section leaves out a picture that is missing.
    """
    evaluation = metrics.evaluation
    title = f"{metrics.run}: a manifold flow on {config.data_name if config else 'images'}"
    shape = "x".join(map(str, image_shape))
    dims = ", ".join(
        f"{dim} (stage {number})" for number, dim in enumerate(evaluation.manifold_dims, start=1)
    )
    unseen = " that it was not trained on" if metrics.warning is None else ""
    warning = f" Warning: {escape(metrics.warning)}." if metrics.warning else ""
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p>The model was evaluated on {evaluation.images:,} images of {escape(evaluation.data)} "
        f"({shape}){unseen}.{warning} Images have {math.prod(image_shape):,} dimensions; "
        f"the manifold has {dims}. All numbers are for the averaged weights.</p>",
        *_likelihood(metrics),
        *_show(pictures, "projections"),
        "<h2>Samples</h2>",
        *_show(pictures, "samples"),
        *_sample_quality(metrics.evaluation.samples),
        *_show(pictures, "interpolations", "Interpolations"),
        *_scores(metrics, pictures),
        *_spectrum(metrics, pictures),
        *_show(pictures, "curves", "Training"),
        *_missing(metrics),
        "<h2>How this report was made</h2>",
        f"<p class=note>mflow evaluate of mflow_kernels {__version__} wrote this page, with torch "
        f"{escape(version('torch'))}. docs/evaluation.md of mflow_kernels describes how each "
        "number is computed; figures.json beside this page holds them in full precision.</p>",
    ]
    if config is not None:
        text = f"<pre>{escape(config.to_yaml())}</pre>"
        sections.append(f"<details><summary>Configuration</summary>{text}</details>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _likelihood(metrics: ReportMetrics) -> Iterable[str]:
    evaluation = metrics.evaluation
    yield "<h2>Likelihood and reconstruction</h2>"
    rows = [[label, *cells] for label, cells in evaluation.rows()]
    yield _table(["", *evaluation.headings()], rows)
    if evaluation.class_accuracy is not None:
        yield f"<p>{evaluation.accuracy_explained()}</p>"
    weighted = metrics.importance_weighted_bits_per_dim
    if weighted is not None:
        yield (
            f"<p>Importance weighting over {metrics.draws} dequantizations of each image gives "
            f"<b>{weighted:.4f}</b> bits per dimension, for all stages together.</p>"
        )
    if metrics.manifold_log_prob is not None:
        yield (
            f"<p>At the projections of {metrics.density_images} images, the mean log-density on "
            "the manifold, with respect to the manifold's own volume, is "
            f"<b>{metrics.manifold_log_prob:.1f}</b> nats (method: {metrics.density_method}).</p>"
        )
    yield (
        f"<p class=note>{PARTS_EXPLAINED} Lower bits per dimension and a higher PSNR are better. "
        "The squared error compares images with their projections on the manifold, on the [0, 1] "
        "scale.</p>"
    )


def _sample_quality(samples: Sequence[SampleQuality]) -> Iterable[str]:
    if not samples:
        return
    first = samples[0]
    where = "off" if first.ambient else "on"
    yield _table(QUALITY_HEADINGS, [row.cells() for row in samples])
    yield (
        "<p class=note>A lower FID and KID and a higher precision and recall are better. Precision "
        "is the share of samples near an image, and recall the share of images near a sample. "
        f"{first.images:,} samples {where} the manifold are compared with {first.images:,} of the "
        f"images, by features of the network {escape(first.network)}. Compare the numbers only "
        "with values from the same network and the same numbers of images.</p>"
    )


def _scores(metrics: ReportMetrics, pictures: Mapping[str, Picture]) -> Iterable[str]:
    yield "<h2>Out-of-distribution scores</h2>"
    shown = [name for name in SCORES if name in metrics.scores[0].medians]
    headings = ["", "images", *(SCORES[name][0] for name in shown)]
    medians, aurocs = [], []
    for row in metrics.scores:
        own = [row.name, f"{row.images:,}"]
        medians.append([*own, *(format(row.medians[name], SCORES[name][1]) for name in shown)])
        found = [row.aurocs.get(name) for name in shown]  # the first set has none
        aurocs.append([*own, *("" if value is None else f"{value:.3f}" for value in found)])
    yield "<h3>Median</h3>"
    yield _table(headings, medians)
    yield "<h3>AUROC</h3>"
    yield _table(headings, aurocs)
    first = min(metrics.density_images, metrics.scores[0].images)
    yield (
        "<p class=note>Typicality is how far an image's bits per dimension are from their mean "
        "over training images. PNG's bits are those of the image as a PNG file. The distance is "
        "between an image and its projection, with pixels on the [0, 1] scale. The latent score "
        "combines it with the density of the manifold coordinates, and the OOD score with the "
        f"density on the manifold (arXiv 2308.13792), for the first {first} images of each set; "
        "both are in nats. Bits or local dimension: how many standard deviations an image's bits "
        "are above those of training images, or its local dimension is below theirs, whichever is "
        "more (arXiv 2403.18910), for the same images. "
        "The AUROC is the probability that an image of the set scores above one of the first set: "
        "1 separates the two perfectly and 0.5 not at all; below 0.5, the set scores lower than "
        "the first.</p>"
    )
    yield from _show(pictures, "scores")


def _spectrum(metrics: ReportMetrics, pictures: Mapping[str, Picture]) -> Iterable[str]:
    if metrics.spectrum is None:
        return
    total, found = len(metrics.spectrum.spectrum), metrics.spectrum.dimension
    yield "<h2>Intrinsic dimension</h2>"
    if found < total:
        yield f"<p>The spectrum drops after {found} of {total:,} dimensions.</p>"
    else:
        yield (
            "<p>The spectrum falls without a sharp drop, as is usual for natural images, so it "
            "suggests no particular dimension.</p>"
        )
    yield from _show(pictures, "spectrum")


def _missing(metrics: ReportMetrics) -> Iterable[str]:
    if metrics.missing:
        yield "<h2>Not computed</h2>"
        yield "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in metrics.missing) + "</ul>"


def _show(pictures: Mapping[str, Picture], name: str, heading: str | None = None) -> Iterable[str]:
    if name not in pictures:
        return
    if heading:
        yield f"<h2>{escape(heading)}</h2>"
    path, caption = pictures[name]
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    yield (
        f'<figure><img alt="{escape(name)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(heads, "th") + "".join(line(row, "td") for row in rows) + "</table>"
