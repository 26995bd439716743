"""The coupling networks of a model, which are compiled and whose weights decay."""

from typing import Any

import torch
from torch import nn

from mflow_kernels.layers import AffineCoupling, SplineCoupling


def compile_networks(model: nn.Module, **options: Any) -> None:
    """Compile every coupling network of a model in place; `options` are torch.compile's."""
    networks = _networks(model)
    # Dynamo limits the recompilations of a function, and all networks share one forward function.
    # Each network shape compiles twice, with and without gradients.
    torch._dynamo.config.recompile_limit = max(64, 4 * len(networks))
    for network in networks:
        network.compile(**options)


def parameter_groups(stage: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split a stage's parameters into the weights of its coupling networks, to which weight decay
    applies, and all others. The positions of a Jet's tokens are added to them, as biases are."""
    weights = {
        id(p)
        for net in _networks(stage)
        for name, p in net.named_parameters()
        if p.dim() > 1 and name.rpartition(".")[2] != "position"
    }
    parameters = list(stage.parameters())
    return [p for p in parameters if id(p) in weights], [
        p for p in parameters if id(p) not in weights
    ]


def _networks(model: nn.Module) -> list[nn.Module]:
    """The coupling networks of a model."""
    return [m.net for m in model.modules() if isinstance(m, AffineCoupling | SplineCoupling)]
