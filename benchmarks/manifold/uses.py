"""Uses of a trained model on digits: noise removed, and hidden pixels filled in.

A chart takes the most probable point of its manifold (`Chart.most_probable`). A flow without a
penalty has no such manifold, so it takes the most probable image: Adam minimizes -log p(x) plus the
squared distance from the given pixels in units of the noise.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.manifold import pictures
from benchmarks.manifold.comparison import Comparison, Settings, about_runs
from benchmarks.manifold.images import comparison
from benchmarks.manifold.judge import judge
from benchmarks.manifold.output import Row, Store, markdown
from benchmarks.manifold.sets import SETS, SIDE
from benchmarks.manifold.training import Method
from mflow_kernels.data.dequantization import dequantize, to_image

METHODS = ("plain likelihood, prior flow", "VAE, prior flow", "M-flow", "penalized, hierarchy")
SECONDS, SEEDS = 60.0, range(3)
IMAGES, SHOWN = 200, 12
NOISES = (0.1, 0.2)  # standard deviations, where black and white are 1 apart
# Deviation of the known pixels off the manifold: the root of the error of the best projections.
DEVIATION = 0.05
STEPS, RATE = 200, 0.02  # of Adam on pixels
METRICS = {
    "noise_0.1": ("error after noise of 0.1", ".4f"),
    "noise_0.2": ("of 0.2", ".4f"),
    "half": ("error of hidden halves", ".4f"),
    "half_right": ("digits recognized", ".3f"),
    "centre": ("error of hidden centres", ".4f"),
    "centre_right": ("digits recognized", ".3f"),
}


def run(store: Store, quick: bool) -> None:
    """Train each method again with the settings of its sweep, and measure its uses."""
    if quick:
        return
    shorter, longer = comparison("digits", False), comparison("digits", False, SECONDS)
    for name in METHODS:
        start = shorter.choose(store, [name])
        settings = longer.choose(store, [name], start)[name]
        for seed in SEEDS:
            make = partial(_train_and_measure, longer, store, name, settings, seed)
            store.row(f"uses-{name}-seed{seed}", make)


def _train_and_measure(
    compared: Comparison, store: Store, name: str, settings: Settings, seed: int
) -> Row:
    method, _ = compared.fit(name, settings, seed, compared.steps(store, name))
    return {"method": name, "seed": seed} | settings._asdict() | measure(method)


def measure(method: Method) -> dict[str, Any]:
    """Return mean squared errors on test digits, and how many the classifier recognizes."""
    test = SETS["digits"]().test
    clean = dequantize(test.images[:IMAGES], 8, torch.Generator().manual_seed(10**6))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(10**6 + 3))
    restore = most_probable_image if method.ambient else on_manifold
    found: dict[str, Any] = {}
    picture = {"digits": to_image(clean[:SHOWN])}
    everything = torch.ones(SIDE, SIDE, dtype=torch.bool)
    for deviation in NOISES:
        noisy = clean + deviation * noise
        restored = restore(method, noisy, everything, deviation)
        error = (restored.clamp(-0.5, 0.5) - clean).square().mean().item()
        found[f"noise_{deviation:g}"] = error
        picture[f"noise of {deviation:g}"] = to_image(noisy[:SHOWN])
        picture[f"{deviation:g} removed"] = to_image(restored[:SHOWN])
    for name, known in masks().items():
        blank = torch.where(known, clean, -0.5)  # black, as most pixels are
        filled = torch.where(known, clean, restore(method, blank, known, DEVIATION))
        hidden = (filled.clamp(-0.5, 0.5) - clean)[..., ~known]
        found[name] = hidden.square().mean().item()
        found[f"{name}_right"] = judge("digits").right(to_image(filled), test.labels[:IMAGES])
        picture[name] = to_image(torch.where(known, clean, 0.0)[:SHOWN])
        picture[f"{name} filled"] = to_image(filled[:SHOWN])
    return found | {"picture": {name: images.tolist() for name, images in picture.items()}}


def masks() -> dict[str, Tensor]:
    """Return the known pixels (16, 16), bool, where the lower half or a centre of 8x8 is hidden."""
    half = torch.ones(SIDE, SIDE, dtype=torch.bool)
    half[SIDE // 2 :] = False
    centre = torch.ones(SIDE, SIDE, dtype=torch.bool)
    centre[SIDE // 4 : -SIDE // 4, SIDE // 4 : -SIDE // 4] = False
    return {"half": half, "centre": centre}


@torch.no_grad()
def on_manifold(method: Method, x: Tensor, known: Tensor, deviation: float) -> Tensor:
    """Return the most probable point of the manifold."""
    return method.model.decode(method.model.most_probable(x, deviation, known, steps=STEPS))


def most_probable_image(method: Method, x: Tensor, known: Tensor, deviation: float) -> Tensor:
    """Return the y that minimizes -log p(y) + sum over known (y - x)^2 / (2 deviation^2)."""
    image = x.clone().requires_grad_()
    adam = torch.optim.Adam([image], lr=RATE)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
    for _ in range(STEPS):
        error = torch.where(known, image - x, 0.0).square().sum() / (2 * deviation**2)
        (image.grad,) = torch.autograd.grad(error - method.model.log_prob(image).sum(), image)
        adam.step()
        falling.step()
    return image.detach()


def report(store: Store) -> dict[str, str]:
    """Draw the first seed's images, and return the table."""
    rows = sorted(store.rows("uses-"), key=lambda row: METHODS.index(row["method"]))
    pictures.draw_uses(store.folder / "uses_digits.png", rows)
    return {"digits-uses": markdown(rows, {"method": "method"}, METRICS) + about_runs(rows)}
