"""Compare masked autoregressive layers with nflows', which inverts in one pass per variable."""

import copy
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mflow_kernels
from benchmarks.harness.measurements import Call
from benchmarks.harness.originals import train
from benchmarks.harness.session import Bench, Group, Measured, Missing, measured_row
from mflow_kernels.interop import accelerate
from mflow_kernels.testing import assert_close

test_autoregressive = measured_row
ROUNDS = 7
VARIANTS = ("mflow_kernels", "nflows", "accelerated nflows")
TASKS = ("sample", "train")


class Vectors(NamedTuple):
    dims: int
    batch: int
    width: int

    def __str__(self) -> str:
        return f"{self.dims} dims, batch {self.batch:,}, width {self.width}"


def specs(size: str) -> list[Vectors]:
    return [Vectors(5, 4, 8)] if size == "tiny" else [Vectors(16, 256, 64), Vectors(64, 256, 128)]


def build(spec: Vectors, variant: str) -> nn.Module:
    if variant == "mflow_kernels":
        return mflow_kernels.MaskedAutoregressive(spec.dims, width=spec.width)
    try:
        transforms = importlib.import_module("nflows.transforms")
    except ImportError as error:
        raise Missing(f"nflows is not installed ({error})") from None
    made = transforms.MaskedAffineAutoregressiveTransform(spec.dims, spec.width, num_blocks=2)
    if variant == "accelerated nflows":
        holder = nn.ModuleList([made])
        if not accelerate(holder).replaced:
            raise Missing("accelerate leaves masked autoregressive layers of nflows as they are")
        return holder[0]
    return made


def drawn(spec: Vectors, variant: str, device: torch.device) -> tuple[nn.Module, Tensor]:
    """A layer with perturbed parameters, and latents."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = build(spec, variant)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        z = torch.randn(spec.batch, spec.dims)
    return layer.to(device), z.to(device)


def check(layer: Any, z: Tensor, spec: Vectors, name: str) -> None:
    """Compare with the forward pass in float64, which is the definition: x = inverse(z) has z."""
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        x, logdet = layer.inverse(z)
        back, want = exact(x.double())
    terms = spec.dims * spec.width  # the errors of earlier variables add up
    assert_close(back.to(z.dtype), z.double(), terms=terms, name=f"{name}: z")
    assert_close(logdet, -want, terms=terms * spec.dims, name=f"{name}: logdet")


def inverse_of(layer: Any, z: Tensor) -> Any:
    return layer.inverse(z)


def task_of(task: str, layer: nn.Module, z: Tensor) -> Call:
    if task == "train":
        return partial(train, layer, z)
    return torch.no_grad()(partial(inverse_of, layer, z))


def measure(bench: Bench, spec: Vectors, task: str) -> Measured:
    measured = Measured()

    def make(variant: str) -> Callable[[], Call]:
        layer, z = drawn(spec, variant, bench.device)
        check(layer, z, spec, variant)
        measured.extra[variant] = {**spec._asdict(), "spec": str(spec), "task": task}
        call = task_of(task, layer, z)
        return lambda: call

    measured.compare(bench, VARIANTS, make, ROUNDS)
    return measured


def groups(size: str, gpu: bool) -> Iterator[Group]:
    for spec in specs(size):
        for task in TASKS:
            measured = partial(measure, spec=spec, task=task)
            yield Group(f"autoregressive, {task}, {spec}", (str(spec), task), VARIANTS, measured)
