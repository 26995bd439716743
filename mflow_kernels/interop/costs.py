"""Rules that say when a library's own code costs less; `accelerate` then leaves the layer.

The limits were measured once for each kind, on one core of a CPU, with eight couplings
(`benchmarks/bench_interop.py`). No limit is known for a GPU, where all layers are replaced.
"""

from collections.abc import Sequence

from mflow_kernels.interop.linear import Linear
from mflow_kernels.interop.parts import Coupling, Elementwise, Part
from mflow_kernels.ops.spline import Spline

VECTOR_CHANNELS = 512  # fewest channels of vectors (N, C) whose couplings gain
UNEQUAL_CHANNELS = 63  # fewest channels whose affine couplings of unequal parts gain
LEARNED_CHANNELS = 128  # most channels of a learned matrix that gains


def why_slower(parts: Sequence[Part], channels: int | None, device: str) -> str:
    """Say why a layer or run costs less as its library computes it; "" if it does not.

    Args:
        channels: of its states, if known.
        device: the type of the device that its weights are on.
    """
    if device != "cpu":
        return ""
    nets = [part.net for part in parts if isinstance(part, Coupling)]
    splines = any(
        isinstance(part, Elementwise)
        or (isinstance(part, Coupling) and isinstance(part.scale, Spline))
        for part in parts
    )
    if not nets and not splines:
        return "it has no coupling, and would not be faster on a CPU"
    if channels is None:
        return ""
    of_pixels = any("Conv" in type(m).__name__ for net in nets for m in net.modules())
    matrices = [p for p in parts if isinstance(p, Linear) and not (p.permutes or p.scales)]
    if not of_pixels and not splines and channels < VECTOR_CHANNELS:
        return (
            f"affine couplings of vectors of fewer than {VECTOR_CHANNELS} numbers would not be "
            "faster on a CPU"
        )
    if not of_pixels and not splines and matrices:
        return "with a matrix between couplings of vectors it would be slower on a CPU"
    unequal = any(
        isinstance(p, Coupling)
        and not isinstance(p.scale, Spline)
        and p.unchanged(channels) != channels // 2
        for p in parts
    )
    if unequal and channels < UNEQUAL_CHANNELS:
        return (
            f"couplings that do not keep half of fewer than {UNEQUAL_CHANNELS} channels would be "
            "slower on a CPU"
        )
    if channels > LEARNED_CHANNELS and not all(p.fixed for p in matrices):
        return (
            f"with a learned matrix of more than {LEARNED_CHANNELS} channels it would be slower on "
            "a CPU"
        )
    return ""
