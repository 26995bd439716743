"""Data-dependent initialization of actnorms, shared by the adapters."""

import warnings

from torch import Tensor, nn


def per_channel(x: Tensor) -> Tensor:
    """Reshape x (N, C, *spatial) to (C, N * P), where P is the number of pixels."""
    return x.transpose(0, 1).flatten(1)


def standard_deviation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the standard deviation of each channel, and whether it is constant up to rounding."""
    samples = per_channel(x)
    std = samples.std(1)
    return std, ~(std > 1e-6 * (1 + samples.mean(1).abs()))


def samples_note(library: str) -> str:
    """The report's note on actnorms that samples would initialize."""
    return (
        f"The direction that runs first initializes ActNorm, as in {library}. Unlike there, "
        "samples do not initialize it in eval mode, and cause a warning in training mode."
    )


def set_by_samples(layer: nn.Module, library: str) -> bool:
    """Whether to initialize an actnorm whose first input comes from samples, not from data.

    Its library always does. We do so in training mode only, with a warning.
    """
    if layer.training:
        message = (
            f"ActNorm of {library} is set from samples, as nothing was trained or encoded before: "
            "a density trained from here may start far off. Encode a batch of data first"
        )
    else:
        message = (
            f"ActNorm of {library} would have been set from samples of a model in eval mode; it "
            "waits for the first batch instead"
        )
    warnings.warn(message, RuntimeWarning, stacklevel=3)
    return layer.training
