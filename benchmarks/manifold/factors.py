"""Images with a known number of factors: which dimension does a manifold flow find?

The images show shaded ellipses. With 2 factors their position varies, with 3 also their size, and
with 5 also angle and brightness. Each flow is trained with one manifold dimension. Its
reconstruction error stops falling when this dimension reaches the number of factors. The error of a
principal component analysis does not, because an image is not linear in the ellipse's position. The
table also shows the dimension that `estimate_intrinsic_dimension` finds in the spectrum of one flow
trained by plain likelihood.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.manifold import methods, training
from benchmarks.manifold.comparison import about_runs
from benchmarks.manifold.output import Row, Store, markdown, save_figure
from mflow_kernels import ManifoldObjective, VectorFlow, estimate_intrinsic_dimension
from mflow_kernels.data.dequantization import to_image
from mflow_kernels.evaluation.pictures import draw_images

SIDE = 12  # small enough for a VectorFlow, whose 1x1 convolutions reach all pixels
NOISE = 0.02
FACTORS = {2: "position", 3: "position, size", 5: "position, size, angle, brightness"}
DIMENSIONS = {2: (1, 2, 3, 4, 5), 3: (1, 2, 3, 4, 5, 6), 5: (2, 3, 4, 5, 6, 7, 8)}
STEPS, WIDTH = 4, 128
BATCH, RATE, SEED = 64, 2e-3, 0
TEST_IMAGES = 500
SPECTRUM_IMAGES = 32
SPECTRUM_STEPS = 3  # training steps, as a multiple of those of a manifold flow
OBJECTIVE = ManifoldObjective("data", "l2", weight=1000.0)


def run(store: Store, quick: bool) -> None:
    """Make the runs."""
    steps = 60 if quick else 500
    for factors in (2,) if quick else tuple(FACTORS):
        for dim in (*DIMENSIONS[factors], 0):
            count = steps if dim else SPECTRUM_STEPS * steps
            store.row(f"factors-{factors}-dim{dim}", partial(train, factors, dim, count))


def train(factors: int, dim: int, steps: int) -> Row:
    """Train and measure a manifold flow of dimension dim, or a flow by plain likelihood if 0."""
    torch.manual_seed(SEED)  # for the weights
    generator = torch.Generator().manual_seed(SEED)
    flow = VectorFlow(SIDE**2, STEPS, WIDTH)
    method = methods.one_stage(flow, dim or 1, OBJECTIVE if dim else methods.NORMAL)
    seconds = training.train(method, batches(factors, generator), [steps], RATE)
    row: Row = {"factors": factors, "dim": dim, "seed": SEED, "steps": steps, "seconds": seconds}
    if not dim:
        x = next(batches(factors, torch.Generator().manual_seed(10**6)))[:SPECTRUM_IMAGES]
        found = estimate_intrinsic_dimension(flow, x)
        return row | found._asdict() | {"spectrum": found.spectrum.tolist()}
    test_generator = torch.Generator().manual_seed(10**6)
    clean = ellipses(TEST_IMAGES, factors, test_generator)
    noisy = clean + NOISE * torch.randn(clean.shape, generator=test_generator)
    with torch.no_grad():
        projected = method.model.project(noisy.flatten(1)).view_as(clean)
    return row | {
        "squared_error": (projected - clean).square().mean().item(),
        "linear_error": _linear_error(clean, dim),
        "picture": {"images": clean[:12].tolist(), "projections": projected[:12].tolist()},
    }


def batches(factors: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield new noisy batches (BATCH, SIDE^2), float32, forever."""
    while True:
        x = ellipses(BATCH, factors, generator).flatten(1)
        yield x + NOISE * torch.randn(x.shape, generator=generator)


def ellipses(n: int, factors: int, generator: torch.Generator) -> Tensor:
    """Draw n images (n, 1, SIDE, SIDE) of shaded ellipses, with values in [-0.5, 0.5].

    The first `factors` of x, y, size, angle and brightness vary, and the images are smooth in them.
    The other factors are fixed.
    """
    uniform = torch.rand(n, 5, generator=generator) - 0.5
    uniform[:, factors:] = 0
    x, y, size, angle, brightness = uniform[:, :, None, None].unbind(1)
    line = torch.linspace(-1, 1, SIDE)
    down, across = torch.meshgrid(line, line, indexing="ij")
    a, b = across - 0.8 * x, down - 0.8 * y
    turn = 0.5 + 1.5 * angle
    along, aside = turn.cos() * a + turn.sin() * b, turn.cos() * b - turn.sin() * a
    radius = 0.55 + 0.3 * size
    inside = torch.sigmoid(6 * (1 - ((along / radius) ** 2 + (aside / (0.6 * radius)) ** 2)))
    shade = (0.75 + 0.5 * brightness) * (1 + 0.4 * torch.tanh(along / radius)) / 1.4
    return (inside * shade - 0.5)[:, None]


def elbow(errors: dict[int, float]) -> int | None:
    """Return the dimension at which the error stops falling, or None if there is no clear one.

    This is where the logarithm of the error bends most. The error must fall by a factor before it
    that is at least twice the factor after it.

    Args:
        errors: error for each of at least three consecutive dimensions.
    """
    logs = {dim: math.log(error) for dim, error in errors.items()}
    bends = {dim: logs[dim - 1] - 2 * logs[dim] + logs[dim + 1] for dim in sorted(logs)[1:-1]}
    found = max(bends, key=lambda dim: bends[dim])
    return found if bends[found] >= math.log(2) else None


def _linear_error(clean: Tensor, dim: int) -> float:
    """Return the mean squared error of the best linear projection of these images to `dim`."""
    values = torch.linalg.svdvals((clean - clean.mean(0)).flatten(1))
    return (values[dim:].square().sum() / clean.numel()).item()


METRICS = {
    "squared_error": ("reconstruction error (MSE)", ".5f"),
    "linear_error": ("error of principal components", ".5f"),
    "seconds": ("CPU s", ".1f"),
}


def report(store: Store) -> dict[str, str]:
    """Draw the pictures of the runs, and return their tables by name."""
    everything, folder = store.rows("factors-"), store.folder
    spectra = {row["factors"]: row for row in everything if not row["dim"]}
    trained = (row for row in everything if row["dim"])
    rows = sorted(trained, key=lambda row: (row["factors"], row["dim"]))
    curves = {
        count: {row["dim"]: row["squared_error"] for row in rows if row["factors"] == count}
        for count in spectra
    }
    _draw_curves(folder / "factors_dimension.png", rows, curves)
    _draw_spectra(folder / "factors_spectrum.png", spectra)
    for count in curves:
        _draw_projections(folder / f"factors_{count}.png", count, rows)
    found: list[Row] = [
        {
            "factors": count, "names": FACTORS[count], "elbow": elbow(errors) or "no bend",
            "step": f"{spectra[count]['dimension']} (gap {spectra[count]['gap']:.1f})",
        }
        for count, errors in curves.items()
    ]  # fmt: skip
    keys = {
        "factors": "factors",
        "names": "which",
        "elbow": "dimension by reconstruction",
        "step": "dimension by spectrum",
    }
    text = [
        markdown(found, keys, {}),
        "\n",
        markdown(rows, {"factors": "factors", "dim": "manifold dimension"}, METRICS),
        f"\nErrors compare projections of noisy images with the clean images, of {SIDE}x{SIDE} "
        f"pixels in a range of 1. The error of the noisy images themselves is {NOISE**2:.5f}. A "
        f"spectrum without a step gives {SIDE**2}.\n",
        about_runs(everything),
    ]
    return {"factors": "\n".join(text)}


def _draw_spectra(path: Path, spectra: dict[int, Row]) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for count, row in spectra.items():
        values = row["spectrum"][:30]
        axis.plot(range(1, len(values) + 1), values, "o-", ms=3, label=f"{count} factors")
    axis.axhline(NOISE, color="0.5", lw=0.8, ls=":", label="noise")
    axis.set(yscale="log", xlabel="rank", ylabel="singular value of the Jacobian")
    axis.set_title("Flows trained by plain likelihood: local standard deviations", fontsize=11)
    axis.legend(fontsize=8)
    save_figure(path, figure)


def _draw_curves(path: Path, rows: Sequence[Row], curves: dict[int, dict[int, float]]) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for colour, (count, errors) in zip(("C0", "C1", "C2"), curves.items(), strict=False):
        own = [row for row in rows if row["factors"] == count]
        axis.plot(list(errors), list(errors.values()), "o-", color=colour, label=f"{count} factors")
        linear = [row["linear_error"] for row in own]
        axis.plot(list(errors), linear, ":", color=colour, label="principal components")
        axis.axvline(count, color=colour, lw=0.6)
    axis.set(yscale="log", xlabel="manifold dimension", ylabel="mean squared error")
    axis.set_title("Reconstruction error; vertical lines: true dimensions", fontsize=11)
    axis.legend(fontsize=8)
    save_figure(path, figure)


def _draw_projections(path: Path, count: int, rows: Sequence[Row]) -> None:
    own = [row for row in rows if row["factors"] == count]
    images = {"true image": torch.tensor(own[0]["picture"]["images"])}
    images |= {f"d = {r['dim']}": torch.tensor(r["picture"]["projections"]) for r in own}
    title = f"Projections of ellipses of {count} factors ({FACTORS[count]})"
    draw_images(path, title, {name: to_image(x) for name, x in images.items()})
