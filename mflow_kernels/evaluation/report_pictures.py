"""The pictures of a report, with their captions."""

from pathlib import Path

import torch
from torch import Tensor

from mflow_kernels.data.dequantization import to_image
from mflow_kernels.data.splits import ImageSet
from mflow_kernels.evaluation.classes import context_of
from mflow_kernels.evaluation.ood import SCORES
from mflow_kernels.evaluation.page import Picture
from mflow_kernels.evaluation.pictures import COLUMNS, draw_histograms, draw_images, draw_spectrum
from mflow_kernels.evaluation.samples import draw_projections, model_input, samples_by_temperature
from mflow_kernels.models.selection import IntrinsicDimension
from mflow_kernels.runs.folder import Trained


@torch.no_grad()
def draw_report(
    run: Trained,
    images: ImageSet,
    kind: str,
    folder: Path,
    scores: dict[str, dict[str, Tensor]],
    spectrum: IntrinsicDimension | None,
    ambient: bool,
) -> dict[str, Picture]:
    """Draw the pictures of a report's page into a folder, and return them by name.

    `kind` says in the captions what the evaluated images are, such as "held-out images". `scores`
    has the result of `score_images` for each set, by name. With `ambient`, the off-manifold
    coordinates of samples are drawn too.
    """
    pictures: dict[str, Picture] = {}

    def add(name: str, caption: str) -> Path:
        pictures[name] = Picture(folder / f"{name}.png", caption)
        return pictures[name].path

    model = run.model
    how = "for the class" if model.class_names else "scaled by the temperature T"
    path = add("samples", f"Each column decodes one draw, {how} of the row.")
    seed = run.config.seed if run.config else 0
    draw_images(path, *samples_by_temperature(model, COLUMNS, seed, ambient))

    path = add(
        "projections", "The projection is what the manifold coordinates preserve of an image."
    )
    title = (
        f"{kind[0].upper()}{kind[1:]} and their projections on the "
        f"{model.manifold_dim}-dimensional manifold"
    )
    draw_projections(path, title, model, images)

    if len(images) > 1:
        path = add(
            "interpolations",
            f"Each row starts and ends with one of the {kind}. The images between them lie on the "
            "manifold, on a straight line in its coordinates u from one projection to the other.",
        )
        title = f"Interpolations on the manifold between {kind}"
        draw_images(path, title, _interpolations(run, images))
    panels = {
        label: {name: own[key] for name, own in scores.items()}
        for key, (label, _) in SCORES.items()
        if key in next(iter(scores.values()))
    }
    draw_histograms(add("scores", "Number of images of each set by score."), panels)
    if spectrum is not None:
        caption = "Local standard deviations: singular values of the decoder's Jacobian."
        draw_spectrum(add("spectrum", caption), spectrum)
    curves = run.folder / "curves.png"
    if curves.is_file():
        pictures["curves"] = Picture(curves, "Drawn by mflow train at the end of training.")
    return pictures


def _interpolations(run: Trained, images: ImageSet) -> dict[str, Tensor]:
    count = min(6, len(images) // 2)
    rows = {}
    for row in range(count):
        first, last = images.batch([row]), images.batch([count + row])
        x0, x1 = model_input(first, run.model), model_input(last, run.model)
        context = context_of(run.model, x0)  # the class of the first image
        points = run.model.interpolate(x0, x1, COLUMNS - 2, context=context)
        points = to_image(points[:, 0]).cpu()
        rows[f"pair {row + 1}"] = torch.cat([first, points, last])
    return rows
