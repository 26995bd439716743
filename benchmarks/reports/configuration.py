"""One configuration of the static report: launches that Triton compiles to one kernel."""

import math
from dataclasses import dataclass

from benchmarks.reports import aot  # before anything of mflow_kernels

from torch import Tensor  # isort: skip

from benchmarks.reports.cases import SHORT
from mflow_kernels.ops import ScaleFunction
from mflow_kernels.ops.layouts import is_channels_last
from mflow_kernels.ops.tiles import Columns


@dataclass
class Configuration:
    """Launches that compile to one kernel, and the widest accesses that their layouts allow."""

    launch: aot.Launch  # the first launch of this configuration
    model: str  # the model that made it
    widths: dict[str, int]  # bytes of the widest accesses that the layouts of arguments allow
    targets: set[str]  # architectures whose launchers make this launch

    @property
    def c(self) -> int:
        return channels(self.launch)

    @property
    def p(self) -> int:
        return max((t[0, 0].numel() for t in states(self.launch).values()), default=0)

    @property
    def layout(self) -> str:
        images = [t for t in states(self.launch).values() if t.dim() == 4]
        layouts = {"channels_last" if is_channels_last(t) else "contiguous" for t in images}
        return " and ".join(sorted(layouts)) or "vectors"

    @property
    def absent(self) -> list[str]:
        """The tensors that the kernel can take and this launch leaves out."""
        bound = self.launch.bound
        return [
            name for name in self.launch.kernel.arg_names if name.islower() and bound[name] is None
        ]

    @property
    def variant(self) -> str:
        """The compile-time choices other than sizes."""
        words = []
        for name, value in self.launch.kwargs.items():
            if value is True and name.isupper():
                words.append(name.lower())
            elif isinstance(value, ScaleFunction):
                eps = f"+{value.eps:g}" if value.eps else ""
                words.append(f"{value.kind}{eps}{'' if value.order == 'shift-scale' else ' s-s'}")
            elif isinstance(value, Columns):
                words += [f"p{value.block}", *(["flat"] if value.flat else [])]
            elif name.startswith("BLOCK") and isinstance(value, int):
                words.append(f"{name[6:].lower()}{value}")
        return " ".join([*words, *(f"-{name}" for name in self.absent)])

    @property
    def dtypes(self) -> str:
        return "+".join(dict.fromkeys(SHORT[t.dtype] for t in states(self.launch).values()))


NO_STATES = {
    *("weight", "weight_inverse", "dweight", "outer_sum", "dbias", "ledger", "dledger"),
    *("dw1", "db1", "dw2", "db2", "dw3", "db3"),
}


def states(launch: aot.Launch) -> dict[str, Tensor]:
    """The arguments that are states, params, network inputs (N, C, H, W) or (N, C), or their
    gradients."""
    return {
        name: value
        for name, value in launch.bound.items()
        if isinstance(value, Tensor) and value.dim() in (2, 4) and name not in NO_STATES
    }


def channels(launch: aot.Launch) -> int:
    """C of the launch's states: a constant of most kernels, otherwise the channels of params."""
    given = launch.bound.get("C")
    return given or max((t.shape[1] for t in states(launch).values()), default=0)


# For each kernel and argument, the constant that holds the columns of the argument's tiles. Their
# rows are pixels.
TILE_COLUMNS = {
    "_conv1x1_kernel": {"x": "BLOCK_C", "dnet": "BLOCK_C", "coupling_params": "BLOCK_C"},
    "_coupling_conv1x1_bwd_kernel": {"dy": "BLOCK_C", "dnet": "BLOCK_C"},
    "_network_kernel": {"x": "BLOCK_X", "h1": "BLOCK_K", "h2": "BLOCK_D", "row_sums": "BLOCK_J"},
    "_dh2_kernel": {"dparams": "BLOCK_J", "h2": "BLOCK_D", "dh2": "BLOCK_D"},
    "_dh1_kernel": {"x": "BLOCK_X", "h1": "BLOCK_D", "dh2": "BLOCK_K", "dx_taps": "BLOCK_X"},
    "_hopper_network_kernel": {
        "x": "BLOCK_X",
        "h1": "BLOCK_D",
        "h2": "BLOCK_D",
        "row_sums": "BLOCK_J",
    },
    "_hopper_dh2_kernel": {"dparams": "BLOCK_R", "h2": "BLOCK_D", "dh2": "BLOCK_D"},
    "_hopper_dh1_kernel": {"x": "BLOCK_X", "h1": "BLOCK_D", "dh2": "BLOCK_K", "dx_taps": "BLOCK_R"},
}


def widest(name: str, launch: aot.Launch) -> int:
    """Bytes of the widest access to an argument.

    A thread adds dnet to dy element by element, so 16 bytes of a float32 dy go with 8 of a 16-bit
    dnet. No access is wider than a thread's part of the tile.
    """
    bound = launch.bound
    itemsize, width = bound[name].element_size(), 16
    dy = bound.get("dy", bound.get("dy_a"))
    if name == "dnet" and dy is not None:
        width = min(width, 16 * itemsize // dy.element_size())
    block_c = TILE_COLUMNS.get(launch.kernel.__name__, {}).get(name)
    if block_c is not None:
        pixels = bound["COLUMNS"].block if "COLUMNS" in bound else bound["BLOCK_P"]
        width = min(width, itemsize * pixels * bound[block_c] // (32 * bound["num_warps"]))
    if name == "row_sums" and bound["BLOCK_R"]:  # the narrower of two blocks of columns
        elements = bound["BLOCK_P"] * bound["BLOCK_R"] // (32 * bound["num_warps"])
        width = min(width, itemsize * elements)
    return width


def widths(launch: aot.Launch) -> dict[str, int]:
    """Bytes of the widest accesses, at most 16, that the layouts of the states allow."""
    allowed, c = {}, channels(launch)
    for name, t in states(launch).items():
        # Lengths of contiguous runs and steps between runs.
        if t.dim() == 2 or is_channels_last(t):
            steps = (c, c // 2, t.shape[1], t.stride(0), t.stride(-1) if t.dim() == 4 else 0)
        else:
            steps = (t.shape[2] * t.shape[3], t.stride(0), t.stride(1))
        if name == "dx_taps":  # a program writes the taps of its own block of hidden channels
            steps += (launch.bound.get("ROWS", 3) * launch.bound["C_IN"],)
        run = math.gcd(*steps) * t.element_size()
        allowed[name] = math.gcd(widest(name, launch), run, t.data_ptr() % 16)
    return allowed
