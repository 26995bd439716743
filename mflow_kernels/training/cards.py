"""Published peaks of named GPUs, and the least time that kernels take on them.

Nothing here was measured. A kernel takes at least the time of its bytes at the card's bandwidth,
and at least the time of its products at the card's tensor throughput. No kernel reaches both.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from mflow_kernels.training.account import Kernel


class Card(NamedTuple):
    """Published peaks: bytes a second, and dense tensor-core operations a second by dtype."""

    bandwidth: float
    throughput: dict[torch.dtype, float]

    def lower_bound(self, kernels: Iterable[Kernel]) -> float:
        """Return the least time in seconds that these kernels take, one after the other."""
        return sum(
            max(k.moved / self.bandwidth, k.flops / self.throughput.get(k.dtype, float("inf")))
            for k in kernels
        )


def _throughput(sixteen_bits: float, tf32: float) -> dict[torch.dtype, float]:
    return {torch.bfloat16: sixteen_bits, torch.float16: sixteen_bits, torch.float32: tf32}


# NVIDIA's data sheets: H100 SXM, A100 80GB SXM, GeForce RTX 4090 (Ada whitepaper, appendix A).
CARDS = {
    "H100": Card(3.35e12, _throughput(989e12, 495e12)),
    "A100": Card(2.04e12, _throughput(312e12, 156e12)),
    "RTX 4090": Card(1.008e12, _throughput(165e12, 82.6e12)),
}
