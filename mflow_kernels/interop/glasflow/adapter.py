"""The adapter of glasflow, which contains a fork of nflows, and of nessai, which uses glasflow."""

import glasflow.nflows.transforms
from glasflow.transforms import AffineCouplingTransform

from mflow_kernels.interop.nflows.transforms import NflowsAdapter

# Release 0.4.1, see `interop/fingerprints.py`.
FINGERPRINTS: dict[str, set[str]] = {
    "glasflow.nflows.transforms.autoregressive": {"cf5e720dbb7b"},
    "glasflow.nflows.transforms.base": {"f7e8b0489460"},
    "glasflow.nflows.transforms.conv": {"8d9c83d5f278"},
    "glasflow.nflows.transforms.coupling": {"1d162cfc3d52"},
    "glasflow.nflows.transforms.linear": {"4213db6a0e2f"},
    "glasflow.nflows.transforms.lu": {"f8df20d57a1d"},
    "glasflow.nflows.transforms.nonlinearities": {"284226ee7627"},
    "glasflow.nflows.transforms.made": {"afa72810360c"},
    "glasflow.nflows.transforms.normalization": {"e37135d8e811"},
    "glasflow.nflows.transforms.permutations": {"2edabc131998"},
    "glasflow.nflows.transforms.reshape": {"6fcc7e7ec8b6"},
    "glasflow.nflows.transforms.splines.rational_quadratic": {"32daf99e67b3"},
    "glasflow.nflows.transforms.standard": {"c4f9fc1a42a2"},
    "glasflow.transforms.coupling": {"f33ae6f844cf"},
}

ADAPTER = NflowsAdapter(
    "glasflow", glasflow.nflows.transforms, FINGERPRINTS, (AffineCouplingTransform,)
)
