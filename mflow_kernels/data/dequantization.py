"""Convert between uint8 images and the continuous data that flows model."""

import torch
from torch import Tensor


def dequantize(images: Tensor, n_bits: int, generator: torch.Generator | None = None) -> Tensor:
    """Convert uint8 images to centred continuous data of the same shape, float32 in [-0.5, 0.5).

    The result is x = (floor(image / 2^(8 - n_bits)) + u) / 2^n_bits - 0.5, with u uniform on
    [0, 1). The mean over u of log2 p(x), less n_bits per dimension, is a lower bound of the image's
    log2-probability (Theis et al., arXiv 1511.01844).

    Raises:
        TypeError: the images are not uint8.
        ValueError: n_bits is not from 1 to 8.
    """
    levels = _levels(images, n_bits)
    noise = torch.rand(images.shape, generator=generator, device=images.device)
    return (levels + noise) / 2**n_bits - 0.5


def bin_centres(images: Tensor, n_bits: int) -> Tensor:
    """Return `dequantize` with u = 1/2 in place of noise: the middle of each quantization bin."""
    return (_levels(images, n_bits) + 0.5) / 2**n_bits - 0.5


def to_image(x: Tensor) -> Tensor:
    """Convert centred data of any float dtype to uint8 images of the same shape.

    Values outside [-0.5, 0.5) are clipped.
    """
    return ((x.float() + 0.5) * 256).floor().clamp(0, 255).to(torch.uint8)


def _levels(images: Tensor, n_bits: int) -> Tensor:
    """Return floor(image / 2^(8 - n_bits)) as float32."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected dtype uint8, got {images.dtype}")
    if not 1 <= n_bits <= 8:
        raise ValueError(f"n_bits: expected 1 to 8, got {n_bits}")
    return torch.div(images, 2 ** (8 - n_bits), rounding_mode="floor").float()
