"""Class-conditional models: the posterior of the class, and the context of images and samples."""

import torch
from torch import Tensor

from mflow_kernels.models import HierarchicalFlow


@torch.no_grad()
def class_log_probs(model: HierarchicalFlow, x: Tensor) -> Tensor:
    """Return log p(x | class) (N, K) in nats for each of the K classes; x is (N, C, H, W).

    With a uniform prior, the softmax over K is the posterior of the class (Bayes' rule).
    """
    own = [torch.full((len(x),), c, device=x.device) for c in range(len(model.class_names))]
    return torch.stack([model.log_prob(x, context=c) for c in own], dim=1)


def context_of(model: HierarchicalFlow, x: Tensor, classes: Tensor | None = None) -> Tensor | None:
    """Return the context for images x: their classes or, if unknown, the most probable ones.

    It is None if the model has no classes.
    """
    if not model.class_names:
        return None
    return class_log_probs(model, x).argmax(1) if classes is None else classes.to(x.device)


def sampled_classes(
    model: HierarchicalFlow, number: int, class_number: int | None = None
) -> Tensor | None:
    """Return the context of `number` samples: one class or, by default, all classes in turn."""
    if not model.class_names:
        return None
    device = next(model.parameters()).device
    if class_number is None:
        return torch.arange(number, device=device) % len(model.class_names)
    return torch.full((number,), class_number, device=device)
