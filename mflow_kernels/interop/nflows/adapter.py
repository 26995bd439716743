"""The adapter of nflows."""

import nflows.transforms

from mflow_kernels.interop.nflows.transforms import NflowsAdapter

# Release 0.14 and the development branch at 5d22344, see `interop/fingerprints.py`.
FINGERPRINTS: dict[str, set[str]] = {
    "nflows.transforms.autoregressive": {"206fab392fd1", "1656811d03ee"},
    "nflows.transforms.base": {"1e7189db9cca"},
    "nflows.transforms.conv": {"d25c64424048"},
    "nflows.transforms.coupling": {"95cdd65ed1f6", "74fc1cdd42cc"},
    "nflows.transforms.linear": {"4eea9c6d8259", "9f9d4214af11"},
    "nflows.transforms.lu": {"6461862c2d76", "536404590d8f"},
    "nflows.transforms.nonlinearities": {"1ae23a507c39", "db7cfa194b9e"},
    "nflows.transforms.made": {"afae775e17fb"},
    "nflows.transforms.normalization": {"15a59aa508ae"},
    "nflows.transforms.permutations": {"db20ec3d915a"},
    "nflows.transforms.reshape": {"14ee2ee3508a"},
    "nflows.transforms.splines.rational_quadratic": {"d633e48678a3", "16ee4e0a3b77"},
    "nflows.transforms.standard": {"17acd0852a3f", "1102d04266aa"},
}

ADAPTER = NflowsAdapter("nflows", nflows.transforms, FINGERPRINTS)
