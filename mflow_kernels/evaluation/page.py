"""A report as one HTML page that needs nothing else: no network, no script, no file beside it."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mflow_kernels import __version__
from mflow_kernels.runs.config import RunConfig

if TYPE_CHECKING:
    from mflow_kernels.evaluation.report import Figures

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; border-bottom: 1px solid #ddd; }
p, figcaption { max-width: 46rem; }
figcaption, .note { color: #555; font-size: .9rem; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; border: 1px solid #eee; }
table { border-collapse: collapse; margin: .6rem 0; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #eee;
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { font-weight: 600; vertical-align: bottom; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


class Picture(NamedTuple):
    path: Path  # a PNG
    caption: str


def page(figures: "Figures", config: RunConfig, pictures: Mapping[str, Picture]) -> str:
    """The page.

    Args:
        figures: all figures.
        config: what the run was made from.
        pictures: by the names that the sections below ask for; a section does without one.
    """
    evaluation = figures.evaluation
    title = f"{figures.run}: a manifold flow on {config.data_name}"
    shape = "x".join(map(str, config.image_shape))
    dims = ", then ".join(map(str, evaluation.manifold_dims))
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p>Evaluated on {evaluation.images:,} images of {escape(evaluation.data)} ({shape}) that "
        f"the model was not trained on. Its manifold has {dims} dimensions of "
        f"{_dimensions(config):,}. All figures are of the averaged weights.</p>",
        *_likelihood(figures),
        *_show(pictures, "projections"),
        "<h2>Samples</h2>",
        *_show(pictures, "samples"),
        *_sample_quality(figures),
        *_show(pictures, "interpolations", "Interpolations"),
        *_scores(figures, pictures),
        *_spectrum(figures, pictures),
        *_show(pictures, "curves", "Training"),
        *_missing(figures),
        "<h2>How it was made</h2>",
        f"<p class=note>By mflow evaluate of mflow_kernels {__version__}, with torch "
        f"{escape(version('torch'))}. Its docs/evaluation.md gives the protocol of each figure; "
        "figures.json beside this page holds all of them in full.</p>",
        f"<details><summary>Configuration</summary><pre>{escape(config.to_yaml())}</pre></details>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _likelihood(figures: "Figures") -> Iterable[str]:
    evaluation = figures.evaluation
    yield "<h2>Likelihood and reconstruction</h2>"
    heads = [
        "stage 1" if number == 1 else f"stages 1-{number}"
        for number in range(1, len(evaluation.stages) + 1)
    ]
    rows = {
        "bits per dimension (less is better)": ("bits_per_dim", ".4f"),
        "of it, log-density on the manifold": ("on_manifold", "+.4f"),
        "of it, log-density off it": ("off_manifold", "+.4f"),
        "of it, log-determinant": ("logdet", "+.4f"),
        "projection, mean squared error": ("mean_squared_error", ".5f"),
        "projection, PSNR (dB, more is better)": ("psnr", ".2f"),
    }
    yield _table(
        ["", *heads],
        [
            [label, *(format(getattr(stage, name), form) for stage in evaluation.stages)]
            for label, (name, form) in rows.items()
        ],
    )
    weighted = figures.importance_weighted_bits_per_dim
    if weighted is not None:
        yield (
            f"<p>With {figures.draws} dequantizations of each image, importance-weighted: "
            f"<b>{weighted:.4f}</b> bits per dimension, of all stages.</p>"
        )
    if figures.manifold_log_prob is not None:
        yield (
            f"<p>Log-density on the manifold at the projections of {figures.density_images} "
            f"images, with respect to its own area ({figures.density_method}): "
            f"<b>{figures.manifold_log_prob:.1f}</b> nats on average.</p>"
        )
    yield (
        "<p class=note>Bits per dimension are those of a pixel less the three parts. The error of "
        "an image's projection on the manifold is on the [0, 1] scale.</p>"
    )


def _sample_quality(figures: "Figures") -> Iterable[str]:
    if not figures.samples:
        return
    first = figures.samples[0]
    yield _table(
        ["temperature", "FID", "KID x 1000", "its deviation"],
        [
            [
                f"{row.temperature:g}",
                f"{row.distance.fid:.2f}",
                f"{1000 * row.distance.kid:.3f}",
                f"{1000 * row.distance.kid_deviation:.3f}",
            ]
            for row in figures.samples
        ],
    )
    yield (
        f"<p class=note>Less is better. Distances between features of the network "
        f"{escape(first.network)} of {first.images:,} samples and of {first.images:,} images that "
        "the model was not trained on; they compare only with those of the same network and "
        "numbers.</p>"
    )


def _scores(figures: "Figures", pictures: Mapping[str, Picture]) -> Iterable[str]:
    yield "<h2>Other images than those it was made for</h2>"
    names = ("bits_per_dim", "distance", "ood_score")
    forms = (".3f", ".3f", ".1f")
    rows = []
    for row in figures.scores:
        cells = [row.name, f"{row.images:,}"]
        for name, form in zip(names, forms, strict=True):
            cells += [_number(getattr(row, name), form), _number(getattr(row, f"auroc_{name}"))]
        rows.append(cells)
    yield _table(
        ["", "images", "bits per dimension", "AUROC", "distance", "AUROC", "OOD score", "AUROC"],
        rows,
    )
    first = min(figures.density_images, figures.scores[0].images)
    yield (
        "<p class=note>Medians. The distance is an image's to its projection, of pixels on the "
        "[0, 1] scale; the OOD score joins it with the density on the manifold, in nats "
        f"(arXiv 2308.13792; of the first {first} images). AUROC is the chance that such an image "
        "scores above a held-out one: 1 tells all of them apart, 0.5 none, and less than 0.5 takes "
        "them for likelier than held-out ones.</p>"
    )
    yield from _show(pictures, "scores")


def _spectrum(figures: "Figures", pictures: Mapping[str, Picture]) -> Iterable[str]:
    if figures.spectrum is None:
        return
    total, found = len(figures.spectrum.spectrum), figures.spectrum.dimension
    yield "<h2>Intrinsic dimension</h2>"
    if found < total:
        yield f"<p>The spectrum has a step after {found} of {total:,} dimensions.</p>"
    else:
        yield (
            "<p>The spectrum falls without a step, as those of natural images do: it speaks for no "
            "one dimension.</p>"
        )
    yield from _show(pictures, "spectrum")


def _missing(figures: "Figures") -> Iterable[str]:
    if figures.missing:
        yield "<h2>Not computed</h2>"
        yield "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in figures.missing) + "</ul>"


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


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def _dimensions(config: RunConfig) -> int:
    channels, height, width = config.image_shape
    return channels * height * width
