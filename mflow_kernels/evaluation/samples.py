"""Images out of a trained model."""

import torch
from torch import Tensor

from mflow_kernels.data.dequantization import to_image
from mflow_kernels.data.generators import Stream, stream_generator
from mflow_kernels.models import HierarchicalFlow

TEMPERATURES = (0.3, 0.5, 0.7, 0.85, 1.0)  # that reports of a model show


@torch.no_grad()
def draw_samples(
    model: HierarchicalFlow, number: int, temperature: float, seed: int, stages: int | None = None
) -> Tensor:
    """`number` images drawn on the manifold, uint8 (number, C, H, W) on the CPU, from the model's
    first `stages` stages (all by default)."""
    device = next(model.parameters()).device
    generator = stream_generator(seed, Stream.SAMPLES, device=device)
    x = model.sample(number, temperature=temperature, generator=generator, stages=stages)
    return to_image(x).cpu()


@torch.no_grad()
def project_images(model: HierarchicalFlow, images: Tensor, stages: int | None = None) -> Tensor:
    """What is left of images (uint8 (N, C, H, W)) on the manifold of the first `stages` stages (all
    by default), uint8 of the same shape on the CPU. Without noise: each level is at its middle."""
    device = next(model.parameters()).device
    x = (images.to(device).float() + 0.5) / 256 - 0.5
    return to_image(model.project(x, stages)).cpu()
