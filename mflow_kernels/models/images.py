"""Images as a model's input."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels.ops.launch import capturing, transformed


def crop_to_model(images: Any, image_shape: tuple[int, ...], crop: int | None) -> Tensor:
    """Crop and resize images to a model's input shape, as `mflow prepare` does.

    Args:
        images: a Pillow image, a uint8 array (H, W) or (H, W, C), or a sequence of these.
        image_shape: (C, S, S).
        crop: side of the central square that is cut out first; None stands for the largest square.

    Returns:
        uint8 (N, C, S, S).

    Raises:
        TypeError, ValueError: an image has another type, has no pixels, is smaller than the crop,
            or has grey values without a defined white.
    """
    # Imported here, because models need Pillow only for this function.
    import numpy as np
    from PIL import Image

    from mflow_kernels.data.decoding import crop_and_resize, plain

    channels, size, width = image_shape
    if size != width:
        raise ValueError(f"images: expected a model of square images, got one of {size}x{width}")
    given = [images] if isinstance(images, (Image.Image, np.ndarray)) else images
    if not isinstance(given, Sequence) or not given:
        raise TypeError(
            "images: expected an image, a uint8 array or a list of them, got "
            f"{type(images).__name__}"
        )
    squares = []
    for i, image in enumerate(given):
        name = "images" if given is not images else f"images[{i}]"
        if isinstance(image, np.ndarray):
            known = image.ndim in (2, 3) and image.shape[2:] in ((), (1,), (3,), (4,))
            if image.dtype != np.uint8 or not known or not image.size:
                raise TypeError(
                    f"{name}: expected a uint8 array (H, W) or (H, W, C), got {image.dtype} "
                    f"{image.shape}"
                )
            image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"{name}: expected a Pillow image or a uint8 array, got {type(image).__name__}"
            )
        try:
            image = plain(image)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if crop is not None and min(image.size) < crop:
            raise ValueError(
                f"{name}: expected at least {crop}x{crop} pixels, which the model's images were "
                f"cropped to, got {image.width}x{image.height}"
            )
        mode = "L" if channels == 1 else "RGB"
        pixels = np.asarray(crop_and_resize(image.convert(mode), size, crop))
        squares.append(pixels.reshape(size, size, channels).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(squares))


def to_pillow(x: Tensor) -> list[Any]:
    """Return x (N, C, H, W) of a range from -1/2 to 1/2 as Pillow images, grey or RGB."""
    from mflow_kernels.data.dequantization import to_image

    if x.shape[1] not in (1, 3):
        raise ValueError(f"x: expected 1 or 3 channels, got {x.shape[1]}")
    return pillow_images(to_image(x.detach()))


def pillow_images(levels: Tensor) -> list[Any]:
    """Return uint8 images (N, C, H, W), with C of 1 or 3, as Pillow images, grey or RGB."""
    from PIL import Image

    pixels = levels.movedim(1, -1).cpu().numpy()
    return [Image.fromarray(p[..., 0] if p.shape[2] == 1 else p) for p in pixels]


def warn_of_raw_images(module: nn.Module, x: Tensor) -> None:
    """Warn if the first images (N, C, H, W) that reach a model have values from 0 to 255."""
    if x.dim() != 4 or getattr(module, "images_checked", False):
        return
    if torch.compiler.is_compiling() or transformed() or capturing(x.device):
        return
    if x.is_meta or type(x) is not Tensor or not x.numel():
        return
    module.images_checked = True  # type: ignore[assignment]
    least, most = x.detach().aminmax()
    if least >= 0 and most > 2:
        warnings.warn(
            f"x: expected images of a range of about 1, as from -0.5 to 0.5, got values up to "
            f"{most.item():g}: scale them as x / 256 - 0.5, or use preprocess() of the model",
            stacklevel=3,
        )
