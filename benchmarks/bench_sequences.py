"""Measure training steps of Glow-TTS' decoder: as published, and as a masked chain."""

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.harness import originals
from benchmarks.harness.glow_tts import Decoder, Size, masked_chain
from benchmarks.harness.originals import Original
from benchmarks.harness.session import Bench, Group, Measured, measured_row

test_sequences = measured_row
VARIANTS = ("original", "mflow_kernels, stored", "mflow_kernels, reversible")


def build(size: Size, batch: int, frames: int, device: torch.device) -> Original:
    """The published decoder, and frames of random lengths from half of `frames` on, with a mask."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder(size)
        for block in model.blocks:
            block.end.weight.data.mul_(0.1)  # type: ignore[union-attr]
        lengths = 2 * torch.randint(frames // 4, frames // 2 + 1, (batch, 1, 1))
        mask = (torch.arange(frames) < lengths).float()
        x = torch.randn(batch, size.mels, frames) * mask
    terms = 9 * sum(p.shape[0] for p in model.parameters())
    return Original(model.to(device), (x.to(device), mask.to(device)), terms, {"terms": terms})


def variant_of(size: Size, published: Decoder, variant: str) -> nn.Module:
    if variant == "original":
        return copy.deepcopy(published)
    chain = masked_chain(published, size)
    chain.reversible = variant.endswith("reversible")
    return chain


def measure(bench: Bench, size: Size, batch: int, frames: int) -> Measured:
    spec = f"B={batch} T={frames} {size.blocks} blocks of width {size.width}"

    def about(model: nn.Module, variant: str) -> dict[str, Any]:
        return {"library": "Glow-TTS", "spec": spec}

    how = partial(build, size, batch, frames), partial(variant_of, size)
    return originals.measure(bench, VARIANTS, *how, about, workers=1)


def groups(size: str, gpu: bool) -> list[Group]:
    of, batch, frames = (
        (Size(4, 2, 4, 2), 2, 8) if size == "tiny" else (Size(), 32 if gpu else 8, 400)
    )
    measured = partial(measure, size=of, batch=batch, frames=frames)
    name = f"Glow-TTS' decoder, B={batch} T={frames}"
    return [Group(name, ("Glow-TTS",), VARIANTS, measured)]
