"""The metrics of an evaluation report, which its page shows and its JSON file holds."""

import json
import math
from dataclasses import asdict, dataclass

from mflow_kernels.evaluation.likelihood import Evaluation
from mflow_kernels.evaluation.ood import SetScores
from mflow_kernels.models.selection import IntrinsicDimension


@dataclass(frozen=True)
class ReportMetrics:
    """All metrics of a report. A value is None if it was not computed; `missing` says why.

    `deviation` is that of the training images (`Chart.deviation`). `manifold_log_prob` is the mean
    over `density_images` of the evaluated images, in nats. `warning` is that of ReportOptions.
    """

    run: str
    evaluation: Evaluation
    draws: int
    importance_weighted_bits_per_dim: float | None
    scores: tuple[SetScores, ...]
    deviation: float | None
    manifold_log_prob: float | None
    density_images: int
    density_method: str
    spectrum: IntrinsicDimension | None
    missing: tuple[str, ...]
    warning: str | None

    def to_json(self) -> str:
        """Serialize as JSON: the spectrum as a list, and numbers that are not finite as null."""
        values = asdict(self)
        if self.spectrum is not None:
            estimate = self.spectrum
            values["spectrum"] = {**estimate._asdict(), "spectrum": estimate.spectrum.tolist()}
        return json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    """Replace numbers that are not finite by None, because JSON cannot hold them."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
