"""A Glow of one size in every package: build it, check it against the reference, and time it."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.measurements import Call
from benchmarks.harness.peer_models import BUILDERS, NOTES, Peer
from benchmarks.harness.plain_glow import Latents, multiscale, with_torch_networks
from benchmarks.harness.session import Bench, Measured
from benchmarks.reports.cases import Constant
from mflow_kernels import FlowStep, Glow
from mflow_kernels.testing import assert_close, tolerance

INVERTIBLE = ("mflow_kernels, stored", "plain", "plain, channels_last", "plain, compiled",
              "normflows", "nflows", "FrEIA")  # fmt: skip
RECOMPUTING = ("mflow_kernels, reversible", "mflow_kernels, nothing stored", "checkpointing",
               "memcnn")  # fmt: skip


class Spec(NamedTuple):
    """The size of a Glow and of its images.

    Attributes:
        constant: whether the networks only return a parameter, so that the time is that of the
            flow's own operators.
        precision: precision of the networks, "float32" or (under autocast) "bfloat16".
    """

    channels: int = 3
    side: int = 32
    levels: int = 3
    steps: int = 8
    width: int = 64
    batch: int = 8
    constant: bool = False
    precision: str = "float32"

    def __str__(self) -> str:
        size = f"B={self.batch} {self.channels}x{self.side}x{self.side} L={self.levels}"
        nets = "constant networks" if self.constant else f"W={self.width}"
        return f"{size} K={self.steps} {nets}" + (" bf16" if self.precision == "bfloat16" else "")

    @property
    def terms(self) -> int:
        """Number of products that a result depends on, in all networks and 1x1 convolutions."""
        return self.levels * self.steps * 9 * self.width

    def glow(self) -> Glow:
        """Build this package's Glow from a fixed seed.

        Its parameters are perturbed, because couplings start as the identity. Wider and deeper
        models are perturbed less: large states could not be compared under bfloat16.
        """
        std = 0.02 * min(1.0, 64 / self.width * 24 / (self.levels * self.steps)) ** 0.5
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            shape = (self.channels, self.side, self.side)
            made = Glow(shape, self.levels, self.steps, 1 if self.constant else self.width)
            for name, parameter in made.named_parameters():
                if name.endswith(("net.4.weight", "net.4.bias")):
                    nn.init.normal_(parameter, std=std)
                elif "actnorm" in name:
                    nn.init.normal_(parameter, std=0.05)
            if self.constant:
                assert self.levels == 1
                for layer in made.chain.layers:
                    if isinstance(layer, FlowStep):
                        side = self.side // 2
                        params = 0.1 * torch.randn(self.batch, 4 * self.channels, side, side)
                        last = params.to(memory_format=torch.channels_last)
                        layer.coupling.net = Constant(last)
        return made

    def images(self, device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        size = (self.batch, self.channels, self.side, self.side)
        return torch.rand(size, generator=generator).sub_(0.5).to(device)

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)


def nll(z: Latents, logdet: Tensor) -> Tensor:
    """Return the negative log-likelihood, without its constant."""
    return (sum(t.square().sum() for t in z) / 2 - logdet.sum()) / len(logdet)


def variants(task: str) -> tuple[str, ...]:
    """Return the variants of a task. Those that recompute activations differ in training only."""
    return INVERTIBLE[:1] + RECOMPUTING + INVERTIBLE[1:] if task == "train" else INVERTIBLE


class Results(NamedTuple):
    """Reference results in float64; `grad` is the gradient of the images."""

    z: Latents
    logdet: Tensor
    grad: Tensor


def results(module: nn.Module, images: Tensor) -> Results:
    x = images.double().requires_grad_()
    z, logdet = module(x)
    (grad,) = torch.autograd.grad(nll(z, logdet), x)
    return Results(tuple(t.detach() for t in z), logdet.detach(), grad)


@lru_cache(maxsize=1)
def shared_results(spec: Spec, device: torch.device) -> Results:
    """Return the reference of the function that this package and most peers compute."""
    return results(multiscale(spec.glow()).double().to(device), spec.images(device))


def assert_gradient_close(
    got: Tensor, want: Tensor, terms: int, name: str, *, low: bool = False
) -> None:
    """Compare gradients of the images through networks with ReLUs, by the norm of the difference.

    Rounding moves a share `tolerance` of the hidden units across zero, and each of these changes
    the gradient of its pixels by the size of that gradient. The norm of the difference is therefore
    bounded by the square root of that share, times the norm of the gradient.

    Args:
        terms: number of products behind one element.
        low: whether the networks compute in bfloat16.
    """
    error = float((got.double() - want).norm() / want.norm())
    bound = tolerance(torch.bfloat16 if low else torch.float32, terms) ** 0.5
    if not error <= bound:
        raise AssertionError(f"{name}: d images: relative error {error:.1e} exceeds {bound:.1e}")


class Model:
    """One variant of a spec.

    Raises:
        Missing: the variant's package is not installed.
    """

    def __init__(self, spec: Spec, variant: str, device: torch.device) -> None:
        self.spec, self.variant, self.device = spec, variant, device
        glow = spec.glow()
        if not variant.startswith("mflow_kernels"):  # this package's Glow is in channels_last
            glow.to(memory_format=torch.contiguous_format)
            with_torch_networks(glow)
        self.peer: Peer = BUILDERS[variant](glow)
        self.module = self.peer.module.to(device)
        # A list, as an optimizer has: Module.zero_grad visits all modules, 3% of a small step.
        self.cleared = list(self.module.parameters())
        self.x = spec.images(device)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)

    def forward(self, x: Tensor) -> tuple[Latents, Tensor]:
        with self.spec.autocast(self.device):
            return self.module(x)

    def train(self) -> None:
        """Run forward and backward, without the optimizer step, which is the same for all."""
        for parameter in self.cleared:
            parameter.grad = None
        nll(*self.forward(self.x)).backward()

    def task(self, name: str) -> Call:
        """Return the call to time for a task: "train", "forward" (no gradients) or "sample"."""
        if name == "train":
            return self.train
        if name == "forward":
            return torch.no_grad()(partial(self.forward, self.x))
        with torch.no_grad():
            z = tuple(t.float().clone() for t in self.forward(self.x)[0])
        return torch.no_grad()(partial(self._inverse, z))

    def _inverse(self, z: Latents) -> tuple[Tensor, Tensor]:
        with self.spec.autocast(self.device):
            return self.module.inverse(z)

    def check(self, task: str) -> None:
        """Compare latents and logdet with the reference; raise AssertionError if they differ.

        For "train", this also compares the gradient of the images, and for "sample" the images that
        the inverse makes of the reference's latents.
        """
        want = (
            results(self.peer.reference().to(self.device), self.x)
            if self.peer.reference
            else shared_results(self.spec, self.device)
        )
        # In training the images require no gradient. If they did here, it would compile again.
        compiled = self.variant.endswith("compiled")
        x = self.x.clone().requires_grad_(not compiled)
        with torch.set_grad_enabled(task == "train"):
            z, logdet = self.forward(x)
        for i, (got, latent) in enumerate(zip(z, want.z, strict=True)):
            self._close(got, latent, f"z[{i}]")
        # The logdet of a step has terms of order one, which may cancel over pixels.
        size = self.spec.channels * self.spec.side**2
        self._close(logdet, want.logdet, "logdet", size**0.5, self.spec.steps * size)
        if task == "train":
            nll(z, logdet).backward()
            if compiled:  # compare the gradient of the first bias: the sum of the images' gradient
                bias = next(p for n, p in self.module.named_parameters() if n.endswith("bias"))
                squeezed = F.pixel_unshuffle(want.grad, 2)
                self._check_gradient(bias.grad, squeezed.sum((0, 2, 3)))
            else:
                assert x.grad is not None
                self._check_gradient(x.grad, want.grad)
        if task == "sample":
            with torch.no_grad():
                back, _ = self._inverse(tuple(t.float() for t in want.z))
            scale = self._sample_scale(want)
            self._close(back, self.x, "sample", scale)

    def _check_gradient(self, got: Tensor, want: Tensor) -> None:
        if self.spec.constant:  # no ReLUs
            self._close(got, want, "d images")
        else:
            low = self.spec.precision == "bfloat16"
            assert_gradient_close(got, want, self.spec.terms, self.variant, low=low)

    def _sample_scale(self, want: Results) -> float:
        """Return the largest magnitude that is rounded on the way to a sample.

        The inverse stretches a latent of level l as much as l levels shrank it, on average over
        its elements.
        """
        levels = self.spec.levels
        per_number = -want.logdet.mean().item() / self.x[0].numel()
        a_level = per_number / (2 - 2.0 ** (1 - levels))
        stretched = [
            t.abs().max().item() * math.exp(a_level * (i + 1)) for i, t in enumerate(want.z)
        ]
        return max(stretched) + self.x.abs().max().item()

    def _close(
        self, got: Tensor, want: Tensor, name: str, scale: float = 0.0, terms: int = 1
    ) -> None:
        if self.spec.precision == "bfloat16":
            # Autocast makes the peers' states bfloat16, so every step rounds them.
            got = got.to(torch.bfloat16)
            roundings = 2 * self.spec.levels * self.spec.steps
            scale = max(scale, want.abs().max().item()) * roundings**0.5
        terms = max(terms, self.spec.terms)
        name = f"{self.variant}: {name}"
        assert_close(got.detach(), want.detach(), terms=terms, scale=scale, name=name)


def _step_of(spec: Spec, variant: str, device: torch.device) -> tuple[nn.Module, Call]:
    model = Model(spec, variant, device)
    return model.module, model.train


def measure(
    bench: Bench, spec: Spec, task: str, variants: Sequence[str], rounds: int, *, memory: bool
) -> Measured:
    """Measure a task, interleaved, for every variant that agrees with the reference.

    With `memory`, also measure the peak memory of a training step. `rounds` is the default number.
    """
    measured, on_gpu = Measured(), bench.device.type == "cuda"

    def make(variant: str) -> Callable[[], Call]:
        model = Model(spec, variant, bench.device)
        model.check(task)
        call = model.task(task)
        call()
        measured.extra[variant] = {
            **spec._asdict(), "spec": str(spec), "task": task, "parameters": model.parameters,
            "note": NOTES[variant],
        }  # fmt: skip
        return lambda: call

    made = measured.compare(bench, variants, make, rounds)
    if memory:
        # The new process would compile a compiled model again, which takes minutes.
        full = bench.size == "full"
        chosen = [variant for variant in made if full or not variant.endswith("compiled")]
        measured.add_peaks(bench, chosen, _step_of, spec, workers=6 if on_gpu else 2)
    return measured
