"""Measure autoregressive flows of other libraries before and after `accelerate`.

python -m benchmarks.autoregressive_growth docs/pictures/autoregressive.png

prints tables in Markdown and draws the first. Process time of one thread: medians of the libraries'
times, and of the ratios of pairs of calls in turns.
"""

import argparse
import copy
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mflow_kernels.interop import accelerate

Build = Callable[[int], Any]
DRAWS, BATCH = 1000, 200
DIMS = (2, 4, 8, 16, 32, 64)


def of_nflows(package: str, name: str, dims: int, width: int = 50, **options: Any) -> nn.Module:
    """Five transforms with permutations between, as sbi's `build_maf` and `build_maf_rqs`."""
    nt, flows, distributions = (
        importlib.import_module(f"{package}.{m}") for m in ("transforms", "flows", "distributions")
    )
    options = {"use_residual_blocks": False, "activation": torch.tanh, **options}
    layers = []
    for _ in range(5):
        layers += [getattr(nt, name)(dims, width, **options), nt.RandomPermutation(dims)]
    flow: nn.Module = flows.Flow(
        nt.CompositeTransform(layers), distributions.StandardNormal([dims])
    )
    return flow


def of_zuko(dims: int) -> nn.Module:
    flow: nn.Module = importlib.import_module("zuko").flows.MAF(
        dims, transforms=5, hidden_features=[50, 50]
    )
    return flow


AFFINE = "MaskedAffineAutoregressiveTransform"
SPLINE = "MaskedPiecewiseRationalQuadraticAutoregressiveTransform"
SPLINES: dict[str, Any] = {"num_bins": 8, "tails": "linear", "tail_bound": 3.0}
MAF: Build = partial(of_nflows, "nflows", AFFINE)
RQ: Build = partial(of_nflows, "nflows", SPLINE, **SPLINES)
DINGO: Build = partial(
    of_nflows,
    "glasflow.nflows",
    SPLINE,
    width=1024,
    num_blocks=5,
    use_residual_blocks=True,
    activation=torch.nn.functional.elu,
    **SPLINES,
)
ROWS: list[tuple[str, Build, int, int]] = [
    ("nflows MAF, 10 dims", MAF, 10, 9),
    ("nflows MAF, 64 dims", MAF, 64, 5),
    ("nflows RQ-AR, 16 dims", RQ, 16, 3),
    ("zuko MAF, 10 dims", of_zuko, 10, 9),
    ("zuko MAF, 64 dims", of_zuko, 64, 5),
    ("glasflow RQ-AR, 1,024 units, five blocks, 15 dims", DINGO, 15, 1),
]


def log_prob(flow: Any, x: Tensor) -> Tensor:
    found: Tensor = (flow() if hasattr(flow, "base") else flow).log_prob(x)
    return found


def train(flow: Any, x: Tensor) -> None:
    flow.zero_grad()
    (-log_prob(flow, x).mean()).backward()


@torch.no_grad()
def evaluate(flow: Any, x: Tensor) -> None:
    log_prob(flow, x)


@torch.no_grad()
def sample(flow: Any, x: Tensor) -> None:
    flow().sample((len(x),)) if hasattr(flow, "base") else flow.sample(len(x))


def seconds(call: Callable[[], None]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def pairs(one: Callable[[], None], other: Callable[[], None], rounds: int) -> tuple[float, float]:
    """The median time of `one` in ms, and the median ratio of the other's time to it."""
    if rounds > 1:
        one()
    other()  # its first call sorts the weights
    found = [(seconds(one), seconds(other)) for _ in range(rounds)]
    return 1e3 * statistics.median(a for a, _ in found), statistics.median(b / a for a, b in found)


def build(make: Build, dims: int) -> tuple[Any, Any]:
    torch.manual_seed(0)
    plain = make(dims)
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.02 * torch.randn_like(p))
    fast = copy.deepcopy(plain)
    report = accelerate(fast)
    if not report.replaced:
        raise ValueError(str(report))
    return plain, fast


def row(name: str, make: Build, dims: int, rounds: int) -> str:
    plain, fast = build(make, dims)
    x, batch = torch.randn(DRAWS, dims), torch.randn(BATCH, dims)
    drawn = pairs(partial(sample, plain, x), partial(sample, fast, x), rounds)
    forward = pairs(partial(evaluate, fast, x), partial(sample, fast, x), max(3, rounds))
    trained = pairs(partial(train, plain, batch), partial(train, fast, batch), 5 * rounds)
    return (
        f"| {name} | {drawn[0]:.1f} ms | {drawn[1]:.3f} | {forward[1]:.2f} "
        f"| {trained[0]:.1f} ms | {trained[1]:.2f} |"
    )


def growth(dims: int) -> tuple[float, float, float]:
    """Times of 1,000 draws in ms, the library's and accelerated, and of our forward pass."""
    plain, fast = build(MAF, dims)
    x = torch.randn(DRAWS, dims)
    drawn = pairs(partial(sample, plain, x), partial(sample, fast, x), 5)
    passed, _ = pairs(partial(evaluate, fast, x), partial(evaluate, fast, x), 5)
    return drawn[0], drawn[0] * drawn[1], passed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", help="the PNG to write")
    parser.add_argument("--tiny", action="store_true", help="two sizes and one row, to try it")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes, rows = (DIMS[:2], ROWS[:1]) if given.tiny else (DIMS, ROWS)
    print("| nflows MAF | " + " | ".join(f"{d} dims" for d in sizes) + " |")
    print("|---" * (1 + len(sizes)) + "|")
    curves = list(zip(*map(growth, sizes), strict=True))
    names = ("nflows, 1,000 draws", "accelerated", "forward pass, accelerated")
    for name, times in zip(names, curves, strict=True):
        print(f"| {name} | " + " | ".join(f"{t:.1f} ms" for t in times) + " |")
    plt = importlib.import_module("matplotlib.pyplot")
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for name, times in zip(names, curves, strict=True):
        axes.loglog(sizes, times, "o-", label=name)
    axes.set(xlabel="dimensions", ylabel="ms on one thread", title="A masked autoregressive flow")
    axes.set_xticks(sizes, map(str, sizes))
    axes.set_xticks([], minor=True)
    axes.legend()
    figure.savefig(given.picture, dpi=150)
    print("\n| | draws, the library's | accelerated | over our forward pass | ", end="")
    print("training step, the library's | accelerated |\n" + "|---" * 6 + "|")
    for one in rows:
        print(row(*one), flush=True)


if __name__ == "__main__":
    main()
