"""The linear layers of other libraries, folded into one weight and bias between two couplings.

Every linear map is x -> W x + bias at each pixel, in the direction data -> latent. Its weight is
computed from the parameters of its module; the maps of K steps are read and folded in one batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mflow_kernels.interop.orders import inverse_of
from mflow_kernels.ops.conv1x1 import inverse_weight_and_bias
from mflow_kernels.ops.launch import transformed
from mflow_kernels.ops.precision import without_autocast
from mflow_kernels.reversible.instructions import FoldedWeights
from mflow_kernels.reversible.linear_maps import LinearMap


class Affine(NamedTuple):
    """K linear maps of C channels.

    Attributes:
        weight: (K, C, C); or (K, C), a diagonal; or integers (K, C), a permutation: channel i of y
            is channel weight[k, i] of x. A diagonal (K, 1) is one factor for all channels.
        bias: (K, C), or (K, 1) with such a diagonal.
        log_det: (K,), log |det W| for one pixel; None stands for 0.
        inverse: (K, C, C), W^-1 if it is known without inverting W.
    """

    weight: Tensor
    bias: Tensor | None = None
    log_det: Tensor | None = None
    inverse: Tensor | None = None


@dataclass(frozen=True, eq=False)
class DataInit:
    """Data-dependent initialization of a layer, such as actnorm.

    Attributes:
        is_pending: returns whether the layer waits for its first batch.
        initialize: sets the layer's scale and shift from a batch. The last argument is True if the
            batch arrives from the latent side.
        state: the tensor that `is_pending` reads, if it reads nothing else. While this tensor is
            unchanged, `is_pending` is not called again.
    """

    is_pending: Callable[[Any], bool]
    initialize: Callable[[Any, Tensor, bool], None]
    state: Callable[[Any], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer: the module with its parameters, and a function that reads K such modules.

    Attributes:
        what: its kind, as the report names it.
        fixed: whether its matrix is not trained, and `read` knows the inverse.
        fits: whether it is one map of channels for a state; None if it is for every state.
    """

    module: nn.Module
    read: Callable[[Sequence[Any]], Affine]
    what: str = "1x1 convolution"
    data_init: DataInit | None = None
    fixed: bool = False
    fits: Callable[[Tensor], bool] | None = None

    @property
    def permutes(self) -> bool:
        return self.what == "permutation"

    @property
    def scales(self) -> bool:
        """Whether it scales and shifts each channel."""
        return self.what in ("actnorm", "scale and shift")

    def kind(self) -> Any:
        return self.read


@dataclass(frozen=True)
class Orders:
    """Reads permutations (C,) that modules store under a name."""

    name: str

    def __call__(self, modules: Sequence[Any]) -> Affine:
        return Affine(stack([getattr(m, self.name) for m in modules]))


def permutation(module: nn.Module, name: str) -> Linear:
    """Return the permutation (C,) that a module stores under this name."""
    return Linear(module, Orders(name), "permutation")


def one_linear(
    read: Callable[[Sequence[Any]], Affine],
    what: str = "1x1 convolution",
    data_init: DataInit | None = None,
) -> Callable[[Any], tuple[Linear]]:
    """Return a function from a layer to its parts, for layers that are one linear map."""
    return lambda layer: (Linear(layer, read, what, data_init),)


@dataclass(frozen=True, eq=False)
class Reorder:
    """A fixed permutation: channel i of y is channel order(C)[i] of x.

    Attributes:
        fits: whether it is this permutation still; None if it cannot change.
    """

    order: Callable[[int], tuple[int, ...]]
    fits: Callable[[Tensor], bool] | None = None
    what: str = "permutation"
    permutes: bool = True
    scales: bool = False
    fixed: bool = False
    data_init: None = None

    def kind(self) -> Any:
        return Reorder


Numbers = tuple[int, ...] | tuple[float, ...]
_constants: dict[tuple[Numbers, torch.device, torch.dtype], Tensor] = {}


def constant(values: Numbers, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return a tensor of these values, which is copied to each device once."""
    key = values, device, dtype
    # Tensors made under a compiler, a transform or a fake mode must not outlive it.
    temporary = torch.compiler.is_compiling() or transformed()
    if key in _constants and not temporary:
        return _constants[key]
    with torch.inference_mode(False):  # autograd cannot save inference tensors
        made = torch.tensor(values, device=device, dtype=dtype)
    if type(made) is Tensor and not temporary:
        _constants[key] = made
    return made


def lu_linears(modules: Sequence[Any]) -> Affine:
    """Read `LULinear` of nflows and normflows: W = L U.

    L has a unit diagonal and U the diagonal softplus(u) + eps; the other entries are stored row by
    row.
    """
    below, above, u, bias = (
        torch.stack([getattr(m, name) for m in modules])
        for name in ("lower_entries", "upper_entries", "unconstrained_upper_diag", "bias")
    )
    k, c = bias.shape
    eps = constant(tuple(m.eps for m in modules), bias.device, bias.dtype)
    diagonal = F.softplus(u) + eps[:, None]
    at_below = torch.tril_indices(c, c, -1, device=bias.device)
    at_above = torch.triu_indices(c, c, 1, device=bias.device)
    lower, upper = (
        bias.new_zeros(k, c * c).index_copy(1, c * at[0] + at[1], entries).view(k, c, c)
        for at, entries in ((at_below, below), (at_above, above))
    )
    lower = lower + torch.eye(c, dtype=bias.dtype, device=bias.device)
    return Affine(lower @ (upper + torch.diag_embed(diagonal)), bias, diagonal.log().sum(1))


def index_of(part: Linear | Reorder, channels: int, device: torch.device) -> Tensor:
    """Return the order (C,) of a permutation."""
    return read_parts([part], channels, device).weight[0]


def read_parts(parts: Sequence[Linear | Reorder], channels: int, device: torch.device) -> Affine:
    """Read K parts of the same kind."""
    if isinstance(parts[0], Reorder):
        orders = [part.order(channels) for part in parts if isinstance(part, Reorder)]
        return Affine(stack([constant(order, device) for order in orders]))
    step = parts[0].read([part.module for part in parts if isinstance(part, Linear)])
    if step.weight.dim() == 2 and step.weight.shape[1] == 1 < channels:
        weight, bias, log_det, _ = step
        return Affine(
            weight.expand(-1, channels),
            None if bias is None else bias.expand(-1, channels),
            None if log_det is None else channels * log_det,
        )
    return step


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack` along a new first axis, which does not copy a tensor that is alone."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack([*tensors])


def _inverted(step: Affine, check: bool) -> Affine:
    """Return the inverse maps x = W^-1 (y - b) in float64.

    `check` is that of `inverse_weight_and_bias`.
    """
    weight, bias, log_det, inverse = step
    bias = None if bias is None else bias.double()
    log_det = None if log_det is None else -log_det
    if not weight.is_floating_point():
        return Affine(weight.argsort(1), None, log_det)
    if weight.dim() == 2:
        scale = 1 / weight.double()
        return Affine(scale, None if bias is None else -scale * bias, log_det)
    if inverse is not None:
        inverse = inverse.double()
        bias = None if bias is None else -(inverse @ bias[:, :, None]).squeeze(2)
        return Affine(inverse, bias, log_det)
    zero = weight.new_zeros(weight.shape[:2]) if bias is None else bias
    return Affine(*inverse_weight_and_bias(weight, zero, check=check), log_det)


class Row(LinearMap):
    """The linear layers between two couplings, data -> latent, on states of `channels` channels."""

    def __init__(
        self, layers: Sequence[Linear | Reorder], channels: int, device: torch.device
    ) -> None:
        self.layers, self.channels, self.device = tuple(layers), channels, device

    @classmethod
    def fold(
        cls,
        maps: Sequence["Row"],
        places: Sequence[str],
        dtype: torch.dtype,
        *,
        inverted: bool,
        check: bool,
    ) -> FoldedWeights:
        """See `LinearMap.fold`. Rows whose layers are of the same kinds are folded in one batch,
        outside autocast."""
        alike: dict[Any, list[int]] = {}
        for i, row in enumerate(maps):
            alike.setdefault(tuple(part.kind() for part in row.layers), []).append(i)
        device = maps[0].device
        with without_autocast(device):
            folded = [
                cls.fold_alike([maps[i] for i in rows], dtype, inverted, check)
                for rows in alike.values()
            ]
        if len(folded) > 1:
            order_of = [i for rows in alike.values() for i in rows]
            order = constant(inverse_of(order_of), device)
            weight, bias, log_det = (torch.cat(part)[order] for part in zip(*folded, strict=True))
            folded = [(weight, bias, log_det)]
        weight, bias, log_det = (part.to(dtype) for part in folded[0])
        return FoldedWeights(weight, bias, log_det.sum())

    @staticmethod
    def fold_alike(
        rows: Sequence["Row"], dtype: torch.dtype, inverted: bool, check: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fold K rows whose layers are of the same kinds, one column of K layers after the other.

        Returns:
            weight (K, C, C), bias (K, C), and log |det weight| (K,) for one pixel.
        """
        k, channels, device = len(rows), rows[0].channels, rows[0].device
        dtype = torch.float64 if inverted else dtype
        weight: Tensor | None = None  # None stands for the identity
        bias = torch.zeros(k, channels, dtype=dtype, device=device)
        log_det = torch.zeros(k, dtype=dtype, device=device)
        columns = list(zip(*(row.layers for row in rows), strict=True))
        for column in reversed(columns) if inverted else columns:
            step = read_parts(column, channels, device)
            if tuple(step.weight.shape[:2]) != (k, channels):
                raise ValueError(f"x: expected {step.weight.shape[1]} channels, got {channels}")
            step = _inverted(step, check) if inverted else step
            if not step.weight.is_floating_point():
                if weight is None:
                    weight = torch.eye(channels, dtype=dtype, device=device).expand(k, -1, -1)
                weight = weight.gather(1, step.weight[:, :, None].expand(-1, -1, channels))
                bias = bias.gather(1, step.weight)
            elif step.weight.dim() == 2:
                scale = step.weight.to(dtype)
                weight = torch.diag_embed(scale) if weight is None else scale[:, :, None] * weight
                bias = scale * bias
            else:
                matrix = step.weight.to(dtype)
                weight = matrix if weight is None else matrix @ weight
                bias = (matrix @ bias[:, :, None]).squeeze(2)
            if step.bias is not None:
                bias = bias + step.bias.to(dtype)
            if step.log_det is not None:
                log_det = log_det + step.log_det.to(dtype)
        assert weight is not None
        return weight, bias, log_det
