"""The masked networks of other libraries, as lists of operations (`ops/masked_network.py`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mflow_kernels.interop.linear import constant
from mflow_kernels.layers.networks import has_hooks
from mflow_kernels.ops.masked_network import (
    Activation,
    ActivationKind,
    Add,
    AddContext,
    Affine,
    Gate,
    Linear,
    Operation,
    Pick,
    network_ref,
)


class Unknown(Exception):
    """A network is no list of our operations; the text is the reason."""


_FUNCTIONS: dict[Any, tuple[ActivationKind, float]] = {
    **dict.fromkeys((F.relu, torch.relu), ("relu", 1.0)),
    F.leaky_relu: ("leaky_relu", 0.01),
    F.elu: ("elu", 1.0),
    **dict.fromkeys((F.selu, torch.selu), ("selu", 1.0)),
    **dict.fromkeys((F.celu, torch.celu), ("celu", 1.0)),
    **dict.fromkeys((F.tanh, torch.tanh), ("tanh", 1.0)),
    **dict.fromkeys((F.sigmoid, torch.sigmoid), ("sigmoid", 1.0)),
    F.silu: ("silu", 1.0),
    F.gelu: ("gelu", 1.0),
    F.softplus: ("softplus", 1.0),
}
_MODULES: dict[type, Callable[[Any], tuple[ActivationKind, float] | None]] = {
    nn.ReLU: lambda m: ("relu", 1.0),
    nn.LeakyReLU: lambda m: ("leaky_relu", m.negative_slope),
    nn.ELU: lambda m: ("elu", m.alpha),
    nn.SELU: lambda m: ("selu", 1.0),
    nn.CELU: lambda m: ("celu", m.alpha),
    nn.Tanh: lambda m: ("tanh", 1.0),
    nn.Sigmoid: lambda m: ("sigmoid", 1.0),
    nn.SiLU: lambda m: ("silu", 1.0),
    nn.GELU: lambda m: ("gelu" if m.approximate == "none" else "gelu_tanh", 1.0),
    nn.Softplus: lambda m: ("softplus", m.beta) if m.threshold == 20 else None,
    nn.Identity: lambda m: ("identity", 1.0),
}


def _activation(function: Any) -> tuple[ActivationKind, float]:
    """The kind of a library's activation, and its constant."""
    if type(function) in _MODULES:
        found = _MODULES[type(function)](function)
        if getattr(function, "inplace", False):
            raise Unknown("its activation changes its input in place")
    else:
        found = _FUNCTIONS.get(function)
    if found is None:
        raise Unknown("its activation is a custom function")
    return found


class Operations(list[Operation]):
    """Operations that read one another; each reads the last value unless `source` names one.

    Attributes:
        only_reads: whether their tensors are those of modules, and none is computed from them.
    """

    only_reads = True

    def put(self, kind: type[Any], *fields: Any, source: int | None = None) -> int:
        """Append an operation; return the index of its value."""
        self.append(kind(len(self) if source is None else source, *fields))
        return len(self)

    def linear(self, layer: Any) -> None:
        self.put(Linear, layer.weight, layer.mask, layer.bias)

    def activate(self, function: Any) -> None:
        self.put(Activation, *_activation(function))

    def batch_norm(self, layer: Any) -> None:
        if layer.running_var is None:
            raise Unknown("its batch norm has no running statistics")
        self.only_reads = False
        scale = (layer.running_var + layer.eps).rsqrt()
        weight = scale if layer.weight is None else scale * layer.weight
        bias = -layer.running_mean * weight
        self.put(Affine, weight, bias if layer.bias is None else bias + layer.bias)

    def scale(self, weight: Tensor, source: int | None = None) -> int:
        self.only_reads = False
        return self.put(Affine, weight, torch.zeros_like(weight), source=source)


Extra = Callable[[Operations, Tensor], None]
"""Appends operations to those before it, for states like the tensor."""


class Network(nn.Module):
    """A library's masked network, whose params are in the order of our operators.

    Args:
        net: the network, which keeps its parameters.
        finish: operations that make our params from the network's.

    Attributes:
        why: why the network is no list of operations; "" if it is one.
    """

    def __init__(self, net: nn.Module, finish: Extra | None = None) -> None:
        super().__init__()
        self.net, self.finish = net, finish
        self._kept: dict[Any, Operations] = {}
        self._tensors: list[tuple[dict[str, Any], str, Any]] = []
        self._random: list[Any] = [
            m for m in net.modules() if isinstance(m, (nn.Dropout, nn.BatchNorm1d))
        ]
        self.why = "its network has hooks" if has_hooks(*net.modules()) else ""
        if not self.is_known():
            self.why = f"its network is a {type(net).__name__} of another kind"
        try:
            if not self.why:
                self.read(Operations(), 0)
        except Unknown as unknown:
            self.why = str(unknown)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_tensors": []}

    def is_listed(self) -> bool:
        """Whether `operations` computes the network now: not if it drops units, or normalizes the
        samples of a batch with one another."""
        return not self.why and not any(m.training and getattr(m, "p", 1) for m in self._random)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """The params of x, by the library's own code."""
        params = self.call(x, *context)
        made = Operations()
        if self.finish is not None:
            self.finish(made, params)
        return network_ref(made, params)

    def operations(
        self, x: Tensor, *context: Tensor, start: Extra | None = None
    ) -> list[Operation]:
        """The network with its present tensors.

        Args:
            start: operations that make the network's input from the value 0.
        """
        key = len(context), start is None, x.device, x.dtype
        kept = not torch.compiler.is_compiling()
        if kept and key in self._kept and all(d[name] is t for d, name, t in self._tensors):
            return self._kept[key]
        made = self._made(x, *context, start=start)
        if kept and made.only_reads:
            found = [d for m in self.net.modules() for d in (m._parameters, m._buffers)]
            self._tensors = [(d, name, t) for d in found for name, t in d.items()]
            self._kept = {key: made}
        return made

    def _made(self, x: Tensor, *context: Tensor, start: Extra | None) -> Operations:
        made = Operations()
        if start is not None:
            start(made, x)
        self.read(made, len(context))
        if self.finish is not None:
            self.finish(made, x)
        return made

    def is_known(self) -> bool:
        """Whether the network and its parts have the library's classes."""
        raise NotImplementedError

    def call(self, x: Tensor, *context: Tensor) -> Tensor:
        raise NotImplementedError

    def read(self, made: Operations, contexts: int) -> None:
        """Append the network's operations, with this number of contexts: 0 or 1.

        Raises:
            Unknown: it is no list of operations.
        """
        raise NotImplementedError

    def contexts(self, *context: Tensor) -> list[Tensor]:
        """The contexts of the operations, (N, units)."""
        raise NotImplementedError


class MadeKinds(NamedTuple):
    """The classes of a library's module with MADE."""

    network: type[nn.Module]
    linear: type[nn.Module]
    residual: type[nn.Module]
    feedforward: type[nn.Module]

    @staticmethod
    def of(module: Any) -> "MadeKinds":
        blocks = module.MaskedResidualBlock, module.MaskedFeedforwardBlock
        return MadeKinds(module.MADE, module.MaskedLinear, *blocks)


class Made(Network):
    """The network MADE of nflows, and of normflows, which changed it.

    nflows adds a context inside each residual block, and normflows gates a block's output by it.
    nflows has two activations more: of the first layer's context, and behind the first layer if
    there are no residual blocks.

    Args:
        kinds: the library's classes.
    """

    kinds: MadeKinds

    def __init__(self, net: nn.Module, kinds: MadeKinds, finish: Extra | None = None) -> None:
        self.kinds = kinds
        super().__init__(net, finish)

    def is_known(self) -> bool:
        net: Any = self.net
        kinds = self.kinds
        masked = [m for m in net.modules() if isinstance(m, kinds.linear)]
        exact = type(net) is kinds.network and all(type(m) is kinds.linear for m in masked)
        return exact and all(type(block) in kinds[2:] for block in net.blocks)

    def call(self, x: Tensor, *context: Tensor) -> Tensor:
        params: Tensor = self.net(x, context[0] if context else None)
        return params

    def read(self, made: Operations, contexts: int) -> None:
        net: Any = self.net
        of_nflows = hasattr(net, "use_residual_blocks")
        preprocessing = getattr(net, "preprocessing", None)
        if hasattr(preprocessing, "inv_perm"):
            _periodic(made, preprocessing)
        made.linear(net.initial_layer)
        if contexts:
            made.put(AddContext, 0)
        if of_nflows and not net.use_residual_blocks:
            made.activate(net.activation)
        for i, block in enumerate(net.blocks):
            if type(block) is self.kinds.feedforward:
                if block.batch_norm is not None:
                    made.batch_norm(block.batch_norm)
                made.linear(block.linear)
                made.activate(block.activation)
                continue
            start = len(made)
            for k in range(2):
                if block.use_batch_norm:
                    made.batch_norm(block.batch_norm_layers[k])
                made.activate(block.activation)
                made.linear(block.linear_layers[k])
                if contexts and k == (0 if of_nflows else 1):
                    made.put(AddContext if of_nflows else Gate, 1 + i)
            made.put(Add, start)
        made.linear(net.final_layer)

    def contexts(self, *context: Tensor) -> list[Tensor]:
        if not context:
            return []
        net: Any = self.net
        first = net.context_layer(context[0])
        if hasattr(net, "use_residual_blocks"):
            first = net.activation(first)
        blocks = [b.context_layer for b in net.blocks if hasattr(b, "context_layer")]
        return [first, *(layer(context[0]) for layer in blocks)]


def _periodic(made: Operations, layer: Any) -> None:
    """normflows' `PeriodicFeaturesElementwise`: w0 sin(s x) + w1 cos(s x) for angles, else x."""
    if layer.apply_bias or type(layer.activation) is not nn.Identity:
        raise Unknown("its periodic features have a bias or an activation")
    weights = layer.weights
    others = weights.new_ones(layer.ndim).index_fill(0, layer.ind, 0.0)
    scale = torch.as_tensor(layer.scale).to(weights).expand(len(layer.ind))
    start = len(made)
    scaled = made.scale(torch.zeros_like(others).index_copy(0, layer.ind, scale))
    total = made.scale(others, source=start)
    for function, weight in zip(("sin", "cos"), weights.unbind(1), strict=True):
        made.put(Activation, function, source=scaled)
        wave = made.scale(torch.zeros_like(others).index_copy(0, layer.ind, weight))
        total = made.put(Add, total, source=wave)


@dataclass(frozen=True)
class Planar:
    """Orders pairs of a raw scale and a shift: all raw scales, then all shifts.

    Attributes:
        raw: the place of the raw scale in a pair.
    """

    features: int
    raw: int

    def __call__(self, made: Operations, x: Tensor) -> None:
        pairs = 2 * self.features
        order = (*range(self.raw, pairs, 2), *range(1 - self.raw, pairs, 2))
        made.put(Pick, constant(order, x.device))
