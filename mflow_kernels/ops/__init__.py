"""The operators. Each is a registered custom op with a reference in plain torch and kernels."""

from mflow_kernels.ops import agreement  # noqa: F401  It compares kernels on their first use.
from mflow_kernels.ops.actnorm import actnorm, actnorm_inverse
from mflow_kernels.ops.conv1x1 import conv1x1, conv1x1_inverse
from mflow_kernels.ops.coupling import affine_coupling, affine_coupling_inverse
from mflow_kernels.ops.coupling_conv1x1 import coupling_conv1x1, coupling_inverse_conv1x1
from mflow_kernels.ops.launch import use_kernels
from mflow_kernels.ops.logdet import accumulate_logdet
from mflow_kernels.ops.masked_autoregressive import MaskedAutoregression
from mflow_kernels.ops.masked_penalty import masked_penalty, masked_penalty_gaussian
from mflow_kernels.ops.penalty_functions import penalty_log_normalizer
from mflow_kernels.ops.rational_quadratic import rational_quadratic, rational_quadratic_inverse
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.ops.spline import Spline
from mflow_kernels.ops.spline_coupling import spline_coupling, spline_coupling_inverse

__all__ = [
    "MaskedAutoregression",
    "ScaleFunction",
    "Spline",
    "accumulate_logdet",
    "actnorm",
    "actnorm_inverse",
    "affine_coupling",
    "affine_coupling_inverse",
    "conv1x1",
    "conv1x1_inverse",
    "coupling_conv1x1",
    "coupling_inverse_conv1x1",
    "masked_penalty",
    "masked_penalty_gaussian",
    "penalty_log_normalizer",
    "rational_quadratic",
    "rational_quadratic_inverse",
    "spline_coupling",
    "spline_coupling_inverse",
    "use_kernels",
]
