"""Draw images from a trained model, project images, and fill in missing pixels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mflow_kernels.data.dequantization import bin_centres, to_image
from mflow_kernels.data.files import make_result
from mflow_kernels.data.generators import Stream, stream_generator
from mflow_kernels.data.splits import ImageSet
from mflow_kernels.evaluation.classes import context_of, sampled_classes
from mflow_kernels.evaluation.pictures import COLUMNS, draw_images, in_rows
from mflow_kernels.models import HierarchicalFlow
from mflow_kernels.models.images import pillow_images

TEMPERATURES = (0.3, 0.5, 0.7, 0.85, 1.0)  # shown in reports and in the pictures of training
MOST_ROWS = 20  # largest number of rows of samples by class


@torch.no_grad()
def draw_samples(
    model: HierarchicalFlow,
    number: int,
    temperature: float,
    seed: int,
    stages: int | None = None,
    class_number: int | None = None,
    ambient: bool = False,
) -> Tensor:
    """Draw uint8 images (number, C, H, W), on the CPU, on the manifold of the model's first
    `stages` stages (default: all), or off it if `ambient`.

    Images of a class-conditional model are of the class `class_number`; by default they go through
    the classes in turn.
    """
    device = next(model.parameters()).device
    generator = stream_generator(seed, Stream.SAMPLES, device=device)
    x = model.sample(
        number,
        temperature=temperature,
        generator=generator,
        stages=stages,
        context=sampled_classes(model, number, class_number),
        off_manifold=ambient,
    )
    return to_image(x).cpu()


def write_images(folder: Path, rows: Mapping[str, Tensor], argument: str) -> None:
    """Write uint8 images (N, C, H, W) as PNG files NAME-0000.png, NAME-0001.png, and so on.

    Without a name there is no hyphen. The folder is new and appears when all files are complete;
    `argument` names it in error messages.
    """

    def fill(temporary: Path) -> None:
        for name, images in rows.items():
            prefix = f"{name}-" if name else ""
            for number, image in enumerate(pillow_images(images)):
                image.save(temporary / f"{prefix}{number:04}.png")

    make_result(folder, fill, argument)


def samples_by_temperature(
    model: HierarchicalFlow, number: int, seed: int, ambient: bool = False
) -> tuple[str, dict[str, Tensor]]:
    """Return a title, and one named row of `number` samples for each of TEMPERATURES.

    All rows use one seed. A class-conditional model has one row for each class instead, at
    temperature 1.
    """
    if model.class_names:
        return "Samples of each class", samples_by_class(model, number, 1.0, seed, ambient=ambient)
    rows = {f"T = {t}": draw_samples(model, number, t, seed, ambient=ambient) for t in TEMPERATURES}
    where = "off" if ambient else "on"
    return f"Samples {where} the manifold at several temperatures", rows


def samples_by_class(
    model: HierarchicalFlow,
    number: int,
    temperature: float,
    seed: int,
    stages: int | None = None,
    ambient: bool = False,
) -> dict[str, Tensor]:
    """Return `number` samples of each class, by its name, for at most MOST_ROWS classes.

    All classes use the same draws.
    """
    return {
        name: draw_samples(model, number, temperature, seed, stages, class_number, ambient)
        for class_number, name in enumerate(model.class_names[:MOST_ROWS])
    }


@torch.no_grad()
def project_images(
    model: HierarchicalFlow,
    images: Tensor,
    stages: int | None = None,
    classes: Tensor | None = None,
) -> Tensor:
    """Project uint8 images (N, C, H, W) on the manifold of the first `stages` stages, to the same
    form on the CPU.

    Each pixel value enters at the middle of its quantization bin, without noise. Without `classes`,
    a class-conditional model takes the most probable ones.
    """
    x = model_input(images, model)
    context = context_of(model, x, classes)
    return to_image(model.project(x, stages=stages, context=context)).cpu()


def draw_projections(
    path: Path,
    title: str,
    model: HierarchicalFlow,
    images: ImageSet,
    number: int = COLUMNS,
    stages: int | None = None,
) -> None:
    """Draw the first `number` images, their projections (see `project_images`) and the absolute
    differences; the footer gives their mean squared error.

    The images' own classes are used, if they have any.
    """
    originals = images.first(number)
    classes = None if images.classes is None else images.classes[:number]
    projections = project_images(model, originals, stages, classes)
    residual = (originals.int() - projections.int()).abs().to(torch.uint8)
    rows = in_rows({"original": originals, "projection": projections, "|difference|": residual})
    squared = (residual.float() / 255).square().mean().item()
    footer = f"Mean squared error of these images on the [0, 1] scale: {squared:.4f}"
    draw_images(path, title, rows, footer)


def known_pixels(missing: Literal["half", "centre", "pixels"], images: Tensor) -> Tensor:
    """Return a mask (N, 1, H, W) for images (N, C, H, W): True where a pixel is known.

    The missing pixels are the right half, the square of half the side in the middle, or three in
    four pixels at random, chosen separately for each image.
    """
    number, _, height, width = images.shape
    known = torch.ones(number, 1, height, width, dtype=torch.bool)
    if missing == "half":
        known[..., width // 2 :] = False
    elif missing == "centre":
        top, left = height // 4, width // 4
        known[:, :, top : height - top, left : width - left] = False
    else:
        generator = stream_generator(0, Stream.MISSING_PIXELS)
        known = torch.rand(known.shape, generator=generator) < 0.25
    return known


def inpaint_images(
    model: HierarchicalFlow, images: Tensor, known: Tensor, classes: Tensor | None = None
) -> Tensor:
    """Fill in the missing pixels of uint8 images (N, C, H, W) from the manifold (`Chart.inpaint`),
    to the same form on the CPU.

    The deviation off the manifold, and the classes of a class-conditional model by default, are
    those of the whole images.
    """
    x = model_input(images, model)
    context = context_of(model, x, classes)
    deviation = model.deviation(x, context=context)
    return to_image(model.inpaint(x, known.to(x.device), deviation, context=context)).cpu()


def model_input(images: Tensor, model: HierarchicalFlow) -> Tensor:
    """Return a model's input for uint8 images: the middle of each of its bins, without noise."""
    device = next(model.parameters()).device
    return bin_centres(images.to(device), 8 if model.n_bits is None else model.n_bits)
