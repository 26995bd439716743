"""Muon's updates of the weights of coupling networks, compared with torch's own optimizers."""

import copy

import pytest
import torch
from torch import nn

from mflow_kernels.training.muon import MuonAdamW


@pytest.mark.parametrize(
    ("shape", "decay"), [((5, 12), 0.0), ((5, 12), 0.3), ((12, 5), 0.3), ((1, 9), 0.3)]
)
def test_updates_are_those_of_torch(shape, decay):
    """torch iterates in bfloat16, so an update may differ by 2^-8 of itself in each iteration."""
    matrix, bias = (nn.Parameter(torch.randn(size)) for size in (shape, (5,)))
    ours = [copy.deepcopy(p) for p in (matrix, bias)]
    references = (
        torch.optim.Muon([matrix], 0.1, decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([bias], 0.1, weight_decay=0.0),
    )
    optimizer = MuonAdamW(
        [
            {"params": ours[:1], "weight_decay": decay, "muon": True},
            {"params": ours[1:], "weight_decay": 0.0, "muon": False},
        ],
        lr=0.1,
    )
    before = [p.detach().clone() for p in ours]
    for skips in (0.0, 1.0, 0.0):
        for p, own in zip((matrix, bias), ours, strict=True):
            p.grad = torch.randn_like(p)
            own.grad = p.grad * (float("nan") if skips else 1.0)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(skips), None
        optimizer.step()
        if not skips:
            for reference in references:
                reference.step()
    change = (matrix - before[0]).norm()
    assert (matrix - ours[0]).norm() < 5 * 2**-8 * change
    torch.testing.assert_close(bias, ours[1])
    assert optimizer.state[ours[0]].keys() == {"step", "exp_avg"}
    assert optimizer.state[ours[0]]["step"] == 2


def test_a_convolution_is_a_matrix_of_its_rows():
    weight = nn.Parameter(torch.randn(4, 3, 3, 3))
    matrix = nn.Parameter(weight.detach().flatten(1).clone())
    for p in (weight, matrix):
        optimizer = MuonAdamW([{"params": [p], "weight_decay": 0.0, "muon": True}], lr=0.1)
        optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), None
        torch.manual_seed(1)
        p.grad = torch.randn(4, 27).view_as(p).to(memory_format=torch.preserve_format)
        optimizer.step()
    torch.testing.assert_close(weight.flatten(1), matrix)
