"""Train briefly with bfloat16 networks, with stored activations, and in float32.

Every run must learn, and all must reach about the same loss.
"""

import math
from statistics import median_high

import torch
from torch import Tensor

from benchmarks.harness.measurements import seconds
from benchmarks.harness.models import Spec, nll
from benchmarks.harness.session import Bench, Group, Measured, measured_row
from mflow_kernels import Glow

test_training = measured_row

VARIANTS = {  # precision of the networks, reversible
    "bf16, reversible": ("bfloat16", True),
    "bf16, stored": ("bfloat16", False),
    "float32, reversible": ("float32", True),
}


def spec_of(size: str, gpu: bool) -> tuple[Spec, int]:
    """Return the model's spec and the number of training steps."""
    if size == "tiny":
        return Spec(3, 8, 2, 2, 8, 8), 30
    return (Spec(3, 64, 4, 8, 256, 32), 100) if gpu else (Spec(3, 16, 2, 4, 32, 16), 60)


def groups(size: str, gpu: bool) -> list[Group]:
    return [Group("short training", (), [*VARIANTS], measure)]


def scenes(spec: Spec, steps: int, device: torch.device) -> Tensor:
    """Draw batches of 5-bit images, dequantized; each shows a disc on a smooth gradient."""
    generator = torch.Generator().manual_seed(0)
    n = (steps + 1) * spec.batch
    at = torch.linspace(-1, 1, spec.side)
    slope, centre, shade = (
        torch.rand(n, k, 1, 1, generator=generator) * 2 - 1 for k in (2, 2, 2 * spec.channels)
    )
    plane = slope[:, :1] * at[:, None] + slope[:, 1:] * at
    inside = ((at[:, None] - centre[:, :1]) ** 2 + (at - centre[:, 1:]) ** 2 < 0.2).float()
    one, two = shade.chunk(2, dim=1)
    images = ((plane * one + inside * two) / 4 + 0.5).clamp(0, 1)
    levels = (images * 31).round() + torch.rand(images.shape, generator=generator)
    return (levels / 32 - 0.5).view(steps + 1, spec.batch, *images.shape[1:]).to(device)


def train(bench: Bench, variant: str) -> tuple[list[float], list[float]]:
    """Train with Adam and return the seconds and the nats per dimension of every step."""
    precision, reversible = VARIANTS[variant]
    spec, steps = spec_of(bench.size, bench.device.type == "cuda")
    spec = spec._replace(precision=precision)
    batches = scenes(spec, steps, bench.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = (spec.channels, spec.side, spec.side)
        glow = Glow(shape, spec.levels, spec.steps, spec.width, reversible=reversible)
    glow.to(bench.device).initialize(batches[0])
    optimizer = torch.optim.Adam(glow.parameters(), lr=1e-3)
    losses: list[Tensor] = []

    def step(x: Tensor) -> None:
        with spec.autocast(bench.device):
            loss = nll(*glow(x)) / math.prod(shape)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(glow.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())

    taken = [seconds(lambda x=x: step(x), bench.device, bench.clock) for x in batches[1:]]
    return taken, torch.stack(losses).tolist()


def measure(bench: Bench) -> Measured:
    measured = Measured()
    curves = {variant: train(bench, variant) for variant in VARIANTS}
    ends = {v: sum(losses[-10:]) / 10 for v, (_, losses) in curves.items()}
    spec, steps = spec_of(bench.size, bench.device.type == "cuda")
    reference = ends["float32, reversible"]
    for variant, (taken, losses) in curves.items():
        start, end = losses[0], ends[variant]
        if not (math.isfinite(end) and end < start):
            fault = AssertionError(f"{variant}: the loss went from {start:.4f} to {end:.4f} nats")
            measured.faults[variant] = fault
        elif abs(end - reference) > 0.1 * (start - reference):
            text = f"{variant}: ends at {end:.4f} nats per dimension, float32 at {reference:.4f}"
            measured.faults[variant] = AssertionError(text)
        measured.seconds[variant] = taken[5:]  # the first steps compile and warm up
        figures = {"steps": steps, "first loss": round(start, 4), "last 10": round(end, 4),
                   "images/s": round(spec.batch / median_high(taken[5:]), 1)}  # fmt: skip
        measured.extra[variant] = {
            "spec": str(spec._replace(precision=VARIANTS[variant][0])),
            "losses": losses,
            "figures": figures,
        }
    return measured
