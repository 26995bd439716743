"""Values and gradients of `rebuild_coupling`, compared with its float64 reference."""

import pytest
import torch
from cases import SCALES, growth, normal

from benchmarks.harness.table import params_shape
from mflow_kernels.ops.rebuild_coupling import rebuild_coupling, rebuild_coupling_ref
from mflow_kernels.ops.scale import ScaleFunction
from mflow_kernels.testing import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_rebuild_coupling(
    device: torch.device, scale: ScaleFunction, inverse: bool, stored: bool, dtype: torch.dtype
) -> None:
    shape = (2, 7, 5, 6)
    last = {"dtype": dtype, "device": device, "layout": "channels_last"}
    z, dz = normal(*shape, **last), normal(*shape, **last)
    params, dlogdet = normal(*params_shape(shape), dtype=dtype), normal(2, dtype=dtype)
    given = z[:, 3:], dz[:, 3:], dlogdet.to(device), params.to(device)
    true = (normal(2, 4, 5, 6, **last),) if stored else ()
    got = rebuild_coupling(*given, scale, inverse, *true)
    exact, exact_true = ([t.double() for t in tensors] for tensors in (given, true))
    want = rebuild_coupling_ref(*exact, scale, inverse, *exact_true)
    for name, a, b in zip(want._fields, got, want, strict=True):
        size = growth(params, scale) * b.abs().max().item()
        assert_close(a, b, scale=size, name=name)
