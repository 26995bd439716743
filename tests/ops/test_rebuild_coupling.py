"""Values and gradients of `rebuild_coupling`, compared with its float64 reference."""

import math

import pytest
import torch
from cases import SCALES, normal

from mflow_kernels.ops.rebuild_coupling import launch_rebuild_coupling, rebuild_coupling_ref
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.ops.table import params_shape
from mflow_kernels.testing import assert_close

# s and 1 / s are at most e^2, so rounding errors of y = z / s - shift, dy and dparams grow by this.
REBUILT_SCALE = math.e**2


@pytest.mark.parametrize("y_given", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_rebuild_coupling(
    kernel_device: torch.device, scale: ScaleFunction, inverse: bool, y_given: bool
) -> None:
    shape = (2, 7, 5, 6)
    z, dz = (normal(*shape, device=kernel_device, layout="channels_last") for _ in range(2))
    params = normal(*params_shape(shape), device=kernel_device)
    dlogdet = normal(2, device=kernel_device)
    z_b, dz_b = z[:, 3:], dz[:, 3:]
    got = launch_rebuild_coupling(z_b, dz_b, dlogdet, params, scale, inverse, y_given)
    want = rebuild_coupling_ref(
        *(t.double() for t in (z_b, dz_b, dlogdet, params)), scale, inverse, y_given
    )
    for name, a, b in zip(want._fields, got, want, strict=True):
        assert_close(a, b, scale=REBUILT_SCALE * b.abs().max().item(), name=name)
