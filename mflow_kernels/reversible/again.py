"""Gradients that can be differentiated again, in a graph of their own.

A reversible backward pass runs a segment once more and differentiates it. Autograd's graph of that
run starts from copies of the segment's inputs: from the inputs themselves, it would go on to what
they were computed from. A node of the outer graph then stands for the results.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def differentiate(
    results: Sequence[Tensor],
    leaves: Sequence[Tensor | None],
    originals: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of the leaves of a graph, from those of its results.

    Args:
        leaves: leaves of the results' graph that may have gradients.
        originals: the tensors whose copies the leaves are, or the leaves themselves.
        cotangents: the gradients of the results, of the outer graph.

    Returns:
        None for a leaf that needs no gradient or has none. If gradients are recorded, they depend
        on `originals` and `cotangents`, and can be differentiated to any order.
    """
    again = torch.is_grad_enabled()
    pairs = [
        (y, dy)
        for y, dy in zip(results, cotangents, strict=True)
        if y.requires_grad and dy is not None
    ]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    copies = [dy.detach().requires_grad_(again and dy.requires_grad) for _, dy in pairs]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if pairs and wanted:
        ys = [y for y, _ in pairs]
        how = {"create_graph": again, "retain_graph": True, "allow_unused": True}
        found = torch.autograd.grad(ys, wanted, copies, **how)
    if again:
        inner, outer = [*leaves, *copies], [*originals, *(dy for _, dy in pairs)]
        known = [g for g in found if g is not None]
        connected = iter(_Connected.apply(known, inner, *outer) if known else ())
        found = [None if g is None else next(connected) for g in found]
    gradients = iter(found)
    return [next(gradients) if leaf is not None and leaf.requires_grad else None for leaf in leaves]


class _Connected(torch.autograd.Function):
    """The results of an inner graph as those of a node of the outer graph."""

    @staticmethod
    def forward(
        ctx: Any, results: list[Tensor], leaves: list[Tensor | None], *originals: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.results, ctx.leaves = results, leaves
        ctx.save_for_backward(*originals)
        return tuple(t.detach() for t in results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        found = differentiate(ctx.results, ctx.leaves, ctx.saved_tensors, cotangents)
        return None, None, *found
