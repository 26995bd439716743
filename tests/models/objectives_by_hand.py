"""The formulas of objectives, as the papers write them."""

import math

import torch

X = (4, 1, 4, 4)


def split_latents(flow, x):
    z, logdet = flow.latents(x)
    v = torch.cat([part[:, m] for part, m in zip(z, flow.off_masks(), strict=True)], 1)
    return flow.gather(z), v, logdet


def log_normal(e, sigma):
    """Return log N(e; 0, sigma^2 I); torch.distributions would round sigma to float32."""
    return (-(e / sigma).square() / 2 - math.log(sigma) - math.log(2 * math.pi) / 2).sum(1)


def rho_of(rho, e, delta):
    """Return rho(e), written a second time. A new penalty function needs a row here."""
    return {
        "l2": e.square() / 2,
        "l1": e.abs(),
        "huber": torch.where(e.abs() <= delta, e.square() / 2, delta * (e.abs() - delta / 2)),
    }[rho]
