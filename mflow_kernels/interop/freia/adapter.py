"""The adapter of FrEIA: how its networks and modules call our kernels.

FrEIA's modules go data -> latent, and latent -> data with `rev=True`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import torch
from torch import Tensor, nn

from mflow_kernels import ops
from mflow_kernels.interop.actnorm_initialization import samples_note
from mflow_kernels.interop.adapter import Adapter, Piece, instance_of
from mflow_kernels.interop.freia.layers import LAYERS, channels_of, is_developed
from mflow_kernels.interop.sequence import FusedSequence
from mflow_kernels.interop.subclasses import implementation_of, same_modules
from mflow_kernels.ops.layouts import pixels

CONTAINERS = (Ff.GraphINN, Ff.SequenceINN)


# Release 0.2, the development branch at 4212496, and the release's AllInOneBlock as anomalib 2.0 to
# 2.7 copy it; see `interop/fingerprints.py`.
FINGERPRINTS: dict[str, set[str]] = {
    "FrEIA.framework.graph_inn": {"48fb2462d7df"},
    "FrEIA.framework.graph_inn.graph_inn": {"e34e3da168a0"},
    "FrEIA.framework.sequence_inn": {"f2e1294a353b", "7bbea98d42c4"},
    "FrEIA.modules.all_in_one_block": {
        *("26fd4fedc6ce", "15ea73004c9d", "b07bf64044fd"),
        "499c6f70404b",
    },
    "FrEIA.modules.coupling_layers": {"1bff124c37e0", "fb1177218330"},
    "FrEIA.modules.fixed_transforms": {"7d893a8aee36", "f8a0b04cf5af"},
    "FrEIA.modules.invertible_resnet": {"733b52c6cfd1", "e1a2e7d5f09c"},
    "FrEIA.modules.orthogonal": {"ae4785021aaf"},
    "FrEIA.modules.reshapes": {"b6fb9488d40d"},
}


class FusedModule(nn.Module):
    """Modules of a network as one module, which takes the conditions of the whole network."""

    def __init__(
        self, layers: Sequence[nn.Module], sequence: FusedSequence, conditions: Sequence[Any]
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.sequence, self.conditions = sequence, list(conditions)

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        if self.sequence.supports(x[0], rev):
            z, log_det = self.sequence(x[0], tuple(c), inverse=rev)
            return (z,), log_det.expand(z.shape[0])
        total = torch.zeros(x[0].shape[0], dtype=x[0].dtype, device=x[0].device)
        pairs = list(zip(self.layers, self.conditions, strict=True))
        for layer, chosen in reversed(pairs) if rev else pairs:
            named = {"c": [c[i] for i in chosen]} if chosen else {}
            x, log_det = layer(x, rev=rev, jac=jac, **named)
            total = total + log_det
        return (x[0],), total


def _layer_forward(returned: Callable[[Tensor, Tensor], Any]) -> Callable[..., Any]:
    """Return `forward` of a module; `returned` packs the state and its log-determinant as it does.

    The module's own code runs if our kernels do not support the number of channels.
    """

    def forward(self: Any, x: Any, c: Any = None, rev: bool = False, jac: bool = True) -> Any:
        sequence: FusedSequence = implementation_of(self)
        c = c or ()
        if not sequence.supports(x[0], rev):
            named = {"c": c} if c else {}
            return super(type(self), self).forward(x, rev=rev, jac=jac, **named)
        z, log_det = sequence(x[0], tuple(c), inverse=rev)
        return returned(z, log_det)

    return forward


def _actnorm_forward(self: Any, x: Any, rev: bool = False, jac: bool = True) -> Any:
    implementation_of(self).initialize_from(x[0], inverse=rev)
    if is_developed(self):
        shift, log_scale = -self.loc.flatten(), -self.log_scale.flatten()
        z, _ = (ops.actnorm_inverse if rev else ops.actnorm)(x[0], shift, log_scale)
        return (z,), (-pixels(z) if rev else pixels(z)) * log_scale.sum()[None]
    # exp(s) x + b is the inverse of exp(-s) (x - b).
    log_scale, shift = -self.scale.flatten(), -self.bias.flatten()
    z, log_det = (ops.actnorm if rev else ops.actnorm_inverse)(x[0], shift, log_scale)
    return [z], log_det


def _developed_actnorm_forward(
    self: Any, x: Any, c: Any = None, rev: bool = False, jac: bool = True
) -> Any:
    if c is not None:
        raise ValueError("ActNorm is unconditional.")
    return _actnorm_forward(self, x, rev, jac)


def _haar_forward(self: Any, x: Any, c: Any = None, jac: bool = True, rev: bool = False) -> Any:
    # In reverse, the original multiplies its input in place.
    x = (x[0].clone(),) if rev else x
    return super(type(self), self).forward(x, c=c, jac=jac, rev=rev)


def _sequence_forward(
    self: Any, x_or_z: Any, c: Any = None, rev: bool = False, jac: bool = True
) -> Any:
    fused: _FusedNetwork = implementation_of(self)
    if not same_modules(self.module_list, fused.modules):
        return super(type(self), self).forward(x_or_z, c, rev, jac)
    x = (x_or_z,) if torch.is_tensor(x_or_z) else x_or_z
    developed = hasattr(Ff.SequenceINN, "__setitem__")
    log_det: Any = torch.zeros(x[0].shape[0], device=x[0].device) if developed else 0
    for module, chosen, _ in reversed(fused.items) if rev else fused.items:
        named = {} if chosen is None else {"c": [c[i] for i in chosen]}
        x, j = module(x, jac=jac, rev=rev, **named)
        log_det = j + log_det
    return x if self.force_tuple_output else x[0], log_det


def _graph_forward(
    self: Any,
    x_or_z: Any,
    c: Any = None,
    rev: bool = False,
    jac: bool = True,
    intermediate_outputs: bool = False,
    x: None = None,
) -> Any:
    fused: _FusedNetwork = implementation_of(self)
    if intermediate_outputs or x is not None or not same_modules(self.module_list, fused.modules):
        original = super(type(self), self).forward
        return original(x_or_z, c, rev, jac, intermediate_outputs, x)
    given = (x_or_z,) if torch.is_tensor(x_or_z) else tuple(x_or_z)
    c = () if c is None else (c,) if torch.is_tensor(c) else tuple(c)
    starts, ends = (self.out_nodes, self.in_nodes) if rev else (self.in_nodes, self.out_nodes)
    for tensors, nodes, what in (
        (given, starts, "inputs"),
        (c, self.condition_nodes, "conditions"),
    ):
        if len(tensors) != len(nodes):
            raise ValueError(f"Got {len(tensors)} {what}, but expected {len(nodes)}.")
    items = fused.items[::-1] if rev else fused.items
    sources = [_sources(nodes, rev) for _, _, nodes in items] + [_sources([n], rev) for n in ends]
    uses = Counter(key for keys in sources for key in keys)
    held: dict[Any, Tensor] = {(node, 0): t for node, t in zip(starts, given, strict=True)}

    def take(key: Any) -> Tensor:
        """Return an output of a node, released after its last use."""
        uses[key] -= 1
        return held[key] if uses[key] else held.pop(key)

    log_det = torch.zeros(given[0].shape[0]).to(given[0])
    del given, x_or_z
    for (module, chosen, nodes), keys in zip(items, sources, strict=False):
        named = {} if chosen is None else {"c": tuple(c[i] for i in chosen)}
        end = nodes[0] if rev else nodes[-1]
        try:
            out = module(tuple(map(take, keys)), rev=rev, jac=jac, **named)
        except Exception as error:
            raise RuntimeError(f"{nodes[0]} encountered an error.") from error
        values, j = _check_output(self, end, out, jac, rev)
        held.update({(end, i): value for i, value in enumerate(values)})
        if jac:
            log_det = log_det + j
    results = tuple(take(keys[0]) for keys in sources[len(items) :])
    return (results[0] if len(results) == 1 and not self.force_tuple_output else results), log_det


def _check_output(graph: Any, node: Any, out: Any, jac: bool, rev: bool) -> Any:
    if hasattr(graph, "_check_output"):
        return graph._check_output(node, out, jac, rev)
    values, j = out  # the development branch's nodes expand log-determinants
    return values, torch.zeros(len(values[0])).to(values[0]) + j if jac else j


def _sources(nodes: Sequence[Any], rev: bool) -> list[Any]:
    return list(nodes[-1].outputs if rev else nodes[0].inputs)


Item = tuple[nn.Module, tuple[int, ...] | None, list[Any]]
"""A module, the indices of the conditions it takes, and its nodes."""


class _FusedNetwork(NamedTuple):
    """The modules of a network, and its items in order, with fused sequences for some modules."""

    modules: list[nn.Module]
    items: list[Item]


def _fused(items: Sequence[Item], sequence: FusedSequence) -> Item:
    conditions = [chosen or () for _, chosen, _ in items]
    last = max((i for indices in conditions for i in indices), default=-1)
    needed = tuple(range(last + 1)) or None  # the indices in `conditions` count from the first
    module = FusedModule([m for m, _, _ in items], sequence, conditions)
    return module, needed, [n for _, _, nodes in items for n in nodes]


METHODS: dict[str, dict[str, Callable[..., Any]]] = {
    "layer": {"forward": _layer_forward(lambda z, log_det: ((z,), log_det.expand(z.shape[0])))},
    "scalar": {"forward": _layer_forward(lambda z, log_det: ((z,), log_det))},
    "nice": {"forward": _layer_forward(lambda z, log_det: ((z,), 0.0))},
    "rotation": {"forward": _layer_forward(lambda z, log_det: ([z], 0.0))},
    "actnorm": {
        "forward": _developed_actnorm_forward
        if hasattr(Fm.ActNorm, "initialize")
        else _actnorm_forward
    },
    "haar": {"forward": _haar_forward},
    "SequenceINN": {"forward": _sequence_forward},
    "GraphINN": {"forward": _graph_forward},
}
KINDS = {
    Fm.ActNorm: "actnorm",
    Fm.Fixed1x1Conv: "scalar",
    Fm.NICECouplingBlock: "nice",
    Fm.HouseholderPerm: "rotation",
    Fm.HaarDownsampling: "haar",
    Fm.PermuteRandom: "rotation",
}


def _sequence_chains(module: Any) -> list[list[Item]]:
    return [
        [
            (m, None if chosen is None else (chosen,), [])
            for m, chosen in zip(module.module_list, module.conditions, strict=True)
        ]
    ]


def _graph_chains(module: Any) -> list[list[Item]]:
    """Return chains of nodes in which each node is the only consumer of the one before it."""
    special = {*module.in_nodes, *module.out_nodes, *module.condition_nodes}
    index = {node: i for i, node in enumerate(module.condition_nodes)}
    chains: list[list[Item]] = []
    chain_of: dict[Any, list[Item]] = {}
    for node in module.node_list:
        if node in special:
            continue
        # Those of the development branch are pairs of a node and its output.
        conditions = [n[0] if isinstance(n, tuple) else n for n in node.conditions]
        chosen = tuple(index[n] for n in conditions) if conditions else None
        before: Any = node.inputs[0][0] if len(node.inputs) == 1 else None
        chain: list[Item] | None = chain_of.get(before)
        if chain is None or len(before.outputs) != 1 or before.outputs[0] != (node, 0):
            chain = []
            chains.append(chain)
        chain.append((node.module, chosen, [node]))
        chain_of[node] = chain
    return chains


def _has_own_conditions(module: Any) -> bool:
    """Whether all conditions come from outside; in the development branch nodes can give them."""
    given = {n[0] if isinstance(n, tuple) else n for m in module.node_list for n in m.conditions}
    return given <= {*module.condition_nodes} and not getattr(module, "ff_nodes", ())


# FrEIA's own code runs on a copy of the input.
_REPAIRED = {"haar": "itself, which in reverse leaves its input alone"}


class FreiaAdapter(Adapter):
    folder = "freia"
    layers = LAYERS
    containers = CONTAINERS
    methods = METHODS
    kinds = KINDS
    fingerprints = FINGERPRINTS
    channels_of = staticmethod(channels_of)
    repaired = _REPAIRED
    notes = (
        (samples_note("FrEIA"), instance_of(Fm.ActNorm)),
        (
            "ActNorm keeps the scale of a channel that is constant in its first batch; FrEIA's "
            "turns to NaN.",
            instance_of(Fm.ActNorm),
        ),
        (
            "AllInOneBlock computes images of any size; FrEIA's raises an error for other sizes "
            "than it was built for.",
            lambda m: is_developed(m) and hasattr(m, "subnet"),
        ),
        (
            "HaarDownsampling leaves its input alone on the way back; FrEIA's changes it.",
            instance_of(Fm.HaarDownsampling),
        ),
        (
            "GraphINN releases a node's output after its last use, unless intermediate_outputs is "
            "True; FrEIA's keeps all outputs to the end.",
            instance_of(Ff.GraphINN),
        ),
    )

    def is_layer(self, module: nn.Module) -> bool:
        return isinstance(module, Fm.InvertibleModule) and not isinstance(module, CONTAINERS)

    def why_left(self, layer: Any) -> str:
        if isinstance(layer, (Fm.Split, Fm.Concat, Fm.Flatten, Fm.Reshape)):
            return "it cuts, joins or reshapes states, with nothing to compute"
        if len(layer.dims_in) > 1:
            return (
                f"it changes {len(layer.dims_in)} states at once, and layers of mflow_kernels "
                "change one"
            )
        return super().why_left(layer)

    def probe(self, layer: Any) -> Callable[[Any], list[Tensor]] | None:
        generator = torch.Generator().manual_seed(0)
        state, *conditions = (
            torch.randn(2, *dims, generator=generator, dtype=torch.float64)
            for dims in (*layer.dims_in, *(layer.dims_c or ()))
        )
        named = {"c": conditions} if conditions else {}

        def values(module: Any) -> list[Tensor]:
            pairs = [module([state], rev=rev, **named) for rev in (False, True)]
            return [t for (z, *_), log_det in pairs for t in (z, torch.as_tensor(log_det))]

        return values

    def fuse(self, container: Any, kind: Any, cut: Callable[..., list[Piece]]) -> Any:
        if kind is Ff.GraphINN and not _has_own_conditions(container):
            return "nodes of it are conditions of others: modules run one by one"
        chains = _sequence_chains(container) if kind is Ff.SequenceINN else _graph_chains(container)
        place = {id(m): i for i, m in enumerate(container.module_list)}
        items: list[Item] = []
        for chain in chains:
            modules = [m for m, _, _ in chain]
            names = [f"module_list.{place[id(m)]}" for m in modules]
            rest = iter(chain)
            for members, sequence in cut(modules, names, [chosen or () for _, chosen, _ in chain]):
                part = list(islice(rest, len(members)))
                items += part if sequence is None else [_fused(part, sequence)]
        # Releasing outputs after their last use is worth it without sequences too.
        if kind is Ff.GraphINN or any(isinstance(m, FusedModule) for m, _, _ in items):
            return _FusedNetwork(list(container.module_list), items)
        return None


ADAPTER = FreiaAdapter()
