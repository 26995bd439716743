"""The parts of each FrEIA module.

FrEIA's modules go data -> latent, and latent -> data with `rev=True`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import FrEIA.modules as Fm
import torch
from torch import Tensor, nn

from mflow_kernels.interop.actnorm_initialization import (
    per_channel,
    set_by_samples,
    standard_deviation,
)
from mflow_kernels.interop.linear import (
    Affine,
    DataInit,
    Linear,
    Listed,
    OfMatrix,
    Reorder,
    inverse_of,
    one_linear,
    permutation,
    stack,
)
from mflow_kernels.interop.params import Joined, Params, Passing
from mflow_kernels.interop.parts import Coupling, Exactly, Part
from mflow_kernels.ops.scale import ATAN, ScaleFunction
from mflow_kernels.reversible.rearrangements import SpaceToDepth

# Linear modules, data -> latent.


def is_developed(layer: Any) -> bool:
    """Whether an `ActNorm` or `AllInOneBlock` is that of FrEIA's development branch."""
    return hasattr(layer, "is_initialized") or hasattr(layer, "_exp_global_scale_activation")


def _actnorms(modules: Sequence[Any]) -> Affine:
    if is_developed(modules[0]):
        log_s = torch.stack([-m.log_scale for m in modules]).flatten(1)
        loc = torch.stack([m.loc for m in modules]).flatten(1)
        return Affine(log_s.exp(), -loc * log_s.exp(), log_s.sum(1))
    log_scale = torch.stack([m.scale for m in modules]).flatten(1)
    bias = torch.stack([m.bias for m in modules]).flatten(1)
    return Affine(log_scale.exp(), bias, log_scale.sum(1))


def _fixed_convs(modules: Sequence[Any]) -> Affine:
    weight, inverse = (
        stack([getattr(m, name).flatten(1) for m in modules]) for name in ("M", "M_inv")
    )
    return Affine(weight, None, stack([m.logDetM for m in modules]), inverse)


def _fixed_linears(modules: Sequence[Any]) -> Affine:
    weight, inverse = (
        torch.stack([getattr(m, name).t() for m in modules]) for name in ("M", "M_inv")
    )
    bias = torch.stack([weight.new_zeros(len(m.M)) + m.b for m in modules])
    log_det = torch.stack([m.logDetM for m in modules])
    return Affine(weight, bias.flatten(1), log_det, inverse)


def _householders(modules: Sequence[Any]) -> Affine:
    weight = [m.W if m.fixed else Fm.orthogonal._fast_h(m.Vs) for m in modules]
    return _orthogonal(torch.stack(weight).mT)


def _orthogonal(weight: Tensor) -> Affine:
    return Affine(weight, inverse=weight.mT)


def _haars(modules: Sequence[Any]) -> Affine:
    """Return the maps that follow the squeeze: a 4x4 block for each channel."""
    weights, log_dets = [], []
    for m in modules:
        blocks = m.haar_weights.reshape(m.in_channels, 4, 4) * m.fac_fwd
        weight = torch.block_diag(*blocks)
        weights.append(weight[m.perm.to(weight.device)] if m.permute else weight)
        log_dets.append(weight.new_tensor(4 * m.in_channels * float(m.jac_fwd)))
    return Affine(torch.stack(weights), None, torch.stack(log_dets))


def _global_affines(blocks: Sequence[Any]) -> Affine:
    scale = torch.stack([b.global_scale_activation(b.global_scale) for b in blocks]).flatten(1)
    offset = torch.stack([b.global_offset for b in blocks]).flatten(1)
    return Affine(scale, offset, scale.log().sum(1))


def _block_permutations(blocks: Sequence[Any]) -> Affine:
    matrices = [
        b._construct_householder_permutation() if b.householder else b.w_perm for b in blocks
    ]
    return _orthogonal(stack(matrices).flatten(2))


def _block_permutations_back(blocks: Sequence[Any]) -> Affine:
    return _orthogonal(_block_permutations(blocks).weight.mT)


def is_pending(layer: Any) -> bool:
    """Whether an actnorm waits for its first batch."""
    if is_developed(layer):
        return not bool(layer.is_initialized)
    return bool(layer.init_on_next_batch)


def _initialize_actnorm(layer: Any, x: Tensor, from_latent: bool) -> None:
    """Initialize an actnorm as FrEIA does, except that a constant channel keeps its scale."""
    if from_latent and not set_by_samples(layer, "FrEIA"):
        return
    std, constant = standard_deviation(x)
    if is_developed(layer):
        log_scale = torch.where(constant, 0.0, std.log()).to(layer.loc.dtype)
        layer.log_scale.copy_(log_scale.view_as(layer.log_scale))
        layer.loc.copy_(per_channel(x).mean(1).view_as(layer.loc))
        layer.is_initialized.fill_(True)
        return
    scale = torch.where(constant, 0.0, -std.log()).to(layer.scale.dtype)
    layer.scale.copy_(scale.view_as(layer.scale))
    layer.bias.copy_((-per_channel(x).mean(1) * scale.exp()).view_as(layer.bias))
    layer.init_on_next_batch = False


_DATA_INIT = DataInit(is_pending, _initialize_actnorm)

# The parts of each module.

_PROBE = torch.linspace(-6, 6, 97, dtype=torch.float64)


def _scale_of(layer: Any) -> tuple[ScaleFunction, float] | str:
    """Return the scale function and the factor of its raw scale, or why there is none."""
    if not layer.clamp > 0:
        return f"its clamp of {layer.clamp} does not bound the scale"
    try:
        clamped = layer.f_clamp(_PROBE)
    except Exception:  # a user's function may raise anything; the layer is left and reported
        return "its clamp activation is a custom function"
    if torch.equal(clamped, ATAN * torch.atan(_PROBE)):
        return ScaleFunction("atan", clamp=layer.clamp, order="scale-shift"), layer.clamp
    if torch.equal(clamped, _PROBE.tanh()):
        return ScaleFunction("tanh", clamp=layer.clamp, order="scale-shift"), layer.clamp
    if torch.equal(clamped, 2.0 * (torch.sigmoid(_PROBE) - 0.5)):
        return ScaleFunction("tanh", clamp=layer.clamp, order="scale-shift"), layer.clamp / 2
    return "its clamp activation is a custom function"


def _params(layer: Any, net: nn.Module, scales: int, factors: tuple[float, float]) -> Params:
    """The params of a network whose first channels are the raw scales."""
    return Params(net, slice(0, scales), slice(scales, None), factors, passing=_passing(layer))


def _passing(layer: Any) -> Passing:
    return "channels" if layer.conditional else "none"


def _two_sided(layer: Any, nets: Sequence[nn.Module], scale: ScaleFunction) -> tuple[Part, ...]:
    """Return two couplings: the second half changes the first, then the first the second."""
    first, second = nets
    n = layer.split_len1
    there = (*range(n, n + layer.split_len2), *range(n))
    return (
        Reorder(Listed(there)),
        Coupling(first, scale, False, Exactly(layer.split_len2)),
        Reorder(Listed(inverse_of(there))),
        Coupling(second, scale, False, Exactly(layer.split_len1)),
    )


def _glow_coupling(layer: Any) -> tuple[Part, ...] | str:
    return _affine(layer, (layer.subnet2, layer.subnet1))


def _rnvp_coupling(layer: Any) -> tuple[Part, ...] | str:
    pairs = (layer.subnet_s2, layer.subnet_t2), (layer.subnet_s1, layer.subnet_t1)
    return _affine(layer, [Joined(s, t) for s, t in pairs])


def _affine(layer: Any, nets: Sequence[nn.Module]) -> tuple[Part, ...] | str:
    scale = _scale_of(layer)
    if isinstance(scale, str):
        return scale
    ends = zip(nets, (layer.split_len1, layer.split_len2), strict=True)
    return _two_sided(layer, [_params(layer, net, n, (scale[1], 1.0)) for net, n in ends], scale[0])


def _nice_coupling(layer: Any) -> tuple[Part, ...]:
    nets = [Params(net, None, slice(None), passing=_passing(layer)) for net in (layer.F, layer.G)]
    return _two_sided(layer, nets, ScaleFunction("exp", order="scale-shift"))


def _one_sided(layer: Any) -> tuple[Part, ...] | str:
    scale = _scale_of(layer)
    if isinstance(scale, str):
        return scale
    net = _params(layer, layer.subnet, layer.split_len2, (scale[1], 1.0))
    return (Coupling(net, scale[0], False, Exactly(layer.split_len1)),)


def _all_in_one(layer: Any) -> tuple[Part, ...] | str:
    if layer.GIN:
        return "its scales are centred over the whole sample, to preserve volume"
    if not layer.clamp > 0:
        return f"its clamp of {layer.clamp} does not bound the scale"
    unchanged, n = layer.splits
    # Release 0.2 multiplies tanh(a) by the clamp, the development branch tanh(a / clamp).
    factors = (0.1 if is_developed(layer) else 0.1 * layer.clamp), 0.1
    net = _params(layer, layer.subnet, n, factors)
    scale = ScaleFunction("tanh", clamp=layer.clamp, order="scale-shift")
    there, back = _mixing(layer)
    return (
        *((back,) if layer.reverse_pre_permute else ()),
        Coupling(net, scale, False, Exactly(unchanged)),
        Linear(layer, _global_affines, "actnorm"),
        there,
    )


def _mixing(block: Any) -> tuple[Part, Part]:
    """The permutation or rotation of a block, and its inverse."""
    if not block.householder and not block.w_perm.is_floating_point():
        return permutation(block, "w_perm"), permutation(block, "w_perm_inv")
    if not block.householder:
        there, back = (OfMatrix(block, "w_perm", back) for back in (False, True))
        if there.holds():
            return Reorder(there, there.holds), Reorder(back, back.holds)
    fixed = not (block.householder or block.w_perm.requires_grad)
    reads = _block_permutations, _block_permutations_back
    rotation, inverse = (Linear(block, read, "rotation", fixed=fixed) for read in reads)
    return rotation, inverse


def _householder(layer: Any) -> tuple[Part, ...] | str:
    if layer.conditional:
        return "its reflections depend on the condition: one matrix a sample"
    return (Linear(layer, _householders),)


def _downsampling(layer: Any) -> tuple[Part, ...] | str:
    if layer.legacy_backend:
        return "its legacy backend has another order of channels"
    plain = torch.eye(4, device=layer.downsample_kernel.device).view(4, 1, 2, 2)
    if not torch.equal(layer.downsample_kernel.float(), plain.repeat(layer.channels, 1, 1, 1)):
        return "its kernel is not the one it was built with"
    return (SpaceToDepth(inverted=isinstance(layer, Fm.IRevNetUpsampling)),)


def _haar(layer: Any) -> tuple[Part, ...] | str:
    if 4 * layer.in_channels > 128:
        return (
            "as a 1x1 convolution of more than 128 channels it would cost more; in reverse it "
            "overwrites its input, as before"
        )
    return (SpaceToDepth(inverted=False), Linear(layer, _haars, "Haar transform"))


LAYERS: dict[type, Callable[[Any], tuple[Part, ...] | str]] = {
    Fm.ActNorm: one_linear(_actnorms, "actnorm", _DATA_INIT),
    Fm.AllInOneBlock: _all_in_one,
    Fm.GLOWCouplingBlock: _glow_coupling,
    Fm.RNVPCouplingBlock: _rnvp_coupling,
    Fm.NICECouplingBlock: _nice_coupling,
    Fm.AffineCouplingOneSided: _one_sided,
    Fm.PermuteRandom: lambda layer: (permutation(layer, "perm"),),
    Fm.Fixed1x1Conv: one_linear(_fixed_convs),
    Fm.FixedLinearTransform: one_linear(_fixed_linears),
    Fm.HouseholderPerm: _householder,
    Fm.IRevNetDownsampling: _downsampling,
    Fm.IRevNetUpsampling: _downsampling,
    Fm.HaarDownsampling: _haar,
}


def channels_of(layer: Any) -> int | None:
    if isinstance(layer, (Fm.IRevNetDownsampling, Fm.HaarDownsampling)):
        return None
    dims = layer.dims_in[0]  # an ActNorm has the dimensions of its one input only
    return int(dims if isinstance(dims, int) else dims[0])
