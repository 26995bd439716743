"""Results and floating point operations of the package's own launches, for `step_counts`."""

from collections.abc import Mapping
from typing import Any

from benchmarks.reports import aot
from benchmarks.reports.cases import CHANNEL_PRODUCTS

# Names of arguments that hold results. OUTPUTS lists the kernels with other names.
DEFAULT_OUTPUTS = {
    "y", "net", "ledger", "dx", "dparams", "dweight", "dbias", "out", "dlog_scale", "logdet",
}  # fmt: skip
OUTPUTS = {
    "_rebuild_conv1x1_kernel": {"x_a", "x_b", "dx_a", "dx_b", "net", "outer_sum", "dbias"},
    "_rebuild_conv1x1_sliced_kernel": {"x", "dx", "net", "outer_sum", "dbias"},
    "_rebuild_conv1x1_wide_kernel": {"x", "dx", "net", "outer_sum", "dbias"},
    "_rebuild_coupling_kernel": {"y_b", "dy_b", "dparams"},
    "_network_kernel": {"row_sums", "h1", "h2"},
    "_sum_taps_kernel": {"y"},
    "_sum_partials_kernel": {"sums"},
    "_dh2_kernel": {"dh2", "dw3", "db3", "db2"},
    "_dh1_kernel": {"dx_taps", "dw2", "dw1", "db1"},
}


def results_of(launch: aot.Launch) -> set[str]:
    """Return the names of the arguments that a launch writes, as the kernel's source has them."""
    name = launch.kernel.__name__
    written = {n for n in launch.bound if n in OUTPUTS.get(name, DEFAULT_OUTPUTS)}
    if not written:
        raise AssertionError(f"{name}: no argument is known to hold a result")
    return written


def _network_flops(kernel: str, given: Mapping[str, Any], repeated: bool) -> int:
    """Return the floating point operations of a network's kernel, with those that its programs
    repeat or without."""
    width, taps = int(given["WIDTH"]), int(given["TAPS"])
    inner = width * taps * int(given.get("C_IN", 0))
    outer = width * taps * int(given.get("C_OUT", 0))
    if kernel == "_network_kernel":
        rows = 3 if taps == 9 else 1
        whole = rows * int(given["C_OUT"]) - int(given["BLOCK_R"])
        columns = -(-whole // int(given["BLOCK_J"])) if repeated else 1
        blocks = -(-width // int(given["BLOCK_D"])) if repeated else 1
        products = columns * (blocks * inner + width**2) + outer
    elif kernel == "_dh2_kernel":
        products = outer * (1 if given["dw3"] is None else 2)
    else:
        products = inner * (1 if given["dw1"] is None else 2)
        products += width**2 * (1 if given["dw2"] is None else 2)
    return 2 * int(given["PIXELS"]) * products


def flops_of(launch: aot.Launch, *, repeated: bool = True) -> int:
    """Return the floating point operations of the products of a launch.

    Args:
        repeated: include the products that programs of a network's kernel compute again.
    """
    if launch.kernel.__name__ in ("_network_kernel", "_dh2_kernel", "_dh1_kernel"):
        return _network_flops(launch.kernel.__name__, launch.bound, repeated)
    products = CHANNEL_PRODUCTS.get(launch.kernel.__name__, 0)
    if not products:
        return 0
    given = launch.bound
    return products * 2 * int(given["N"]) * int(given["P"]) * int(given["C"]) ** 2
