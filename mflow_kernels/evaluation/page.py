"""The report as one self-contained HTML page: it needs no network, script or other file."""

import base64
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from mflow_kernels import __version__
from mflow_kernels.evaluation.features import QUALITY_HEADINGS
from mflow_kernels.evaluation.likelihood import PARTS_EXPLAINED
from mflow_kernels.evaluation.metrics import ReportMetrics
from mflow_kernels.evaluation.ood import SCORES
from mflow_kernels.runs.config import RunConfig


class Picture(NamedTuple):
    path: Path  # PNG file
    caption: str


def page(
    metrics: ReportMetrics,
    image_shape: tuple[int, ...],
    config: RunConfig | None,
    pictures: Mapping[str, Picture],
) -> str:
    """Make the page from the template page.html, without a configuration for an export.

    `pictures` has them by name; a section leaves out a picture that is missing.
    """
    environment = Environment(
        loader=PackageLoader("mflow_kernels", "evaluation"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    evaluation = metrics.evaluation
    shown = [name for name in SCORES if name in metrics.scores[0].medians]
    medians, aurocs = [], []
    for row in metrics.scores:
        own = [row.name, f"{row.images:,}"]
        medians.append([*own, *(format(row.medians[name], SCORES[name][1]) for name in shown)])
        found = [row.aurocs.get(name) for name in shown]  # the first set has none
        aurocs.append([*own, *("" if value is None else f"{value:.3f}" for value in found)])
    return environment.get_template("page.html").render(
        title=f"{metrics.run}: a manifold flow on {config.data_name if config else 'images'}",
        metrics=metrics,
        evaluation=evaluation,
        shape="x".join(map(str, image_shape)),
        dimensions=math.prod(image_shape),
        likelihoods=[[label, *cells] for label, cells in evaluation.rows()],
        parts_explained=PARTS_EXPLAINED,
        quality_headings=QUALITY_HEADINGS,
        quality=[row.cells() for row in evaluation.samples],
        score_headings=["", "images", *(SCORES[name][0] for name in shown)],
        medians=medians,
        aurocs=aurocs,
        config=config,
        pictures=pictures,
        version=__version__,
        torch_version=version("torch"),
    )
