"""Jet, compared with the paper (arXiv 2412.15129) and with torch's own transformer layers."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from cases import compiles, normal, perturbed
from torch import nn

from mflow_kernels import Jet
from mflow_kernels.models.jet import TokenNetwork
from mflow_kernels.testing import assert_close, check_bijection

SETUPS = {
    "grey": ((1, 8, 8), 2, 6),
    "colour, patches of 4": ((3, 4, 8), 4, 4),
    "odd numbers of channels and rows": ((3, 3, 4), 1, 7),
}


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_each_coupling_changes_a_half_of_the_channels_or_tokens(setup):
    """By y = 2 sigmoid(raw) (x + shift), where all outputs of its network are 1/2 here."""
    shape, patch, couplings = setup
    jet = Jet(shape, patch, couplings, 1, 8, 2).double()
    x, unchanged = normal(2, *shape, dtype=torch.float64), copy.deepcopy(jet)
    coupled = 2 * (x + 0.5) / (1 + math.exp(-0.5))
    networks = [m for m in jet.modules() if isinstance(m, TokenNetwork)]
    assert len(networks) == couplings
    halves = set()
    for i, network in enumerate(networks):
        nn.init.constant_(network.out.bias, 0.5)
        found, _ = unchanged.inverse(jet(x)[0])
        nn.init.zeros_(network.out.bias)
        changed = found != x
        assert_close(found, torch.where(changed, coupled, x), terms=10)
        tokens = changed.float()
        for _ in range(patch.bit_length() - 1):
            tokens = F.pixel_unshuffle(tokens, 2)
        _, channels, height, width = tokens.shape
        if i % 3 == 2:
            squares = (torch.arange(height)[:, None] + torch.arange(width)) % 2
            assert torch.equal(tokens, (squares != i // 3 % 2).float().expand_as(tokens))
        else:
            half = tokens[:1, :, :1, :1]
            assert torch.equal(tokens, half.expand_as(tokens))
            assert half.sum() == channels - channels // 2
            halves.add(tuple(half.flatten().tolist()))
    assert len(halves) > 1


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_it_is_a_bijection(setup):
    shape, patch, couplings = setup
    check_bijection(Jet(shape, patch, couplings, 2, 8, 2), (2, *shape))


@pytest.mark.parametrize("classes", [0, 3])
def test_gradients_of_rebuilt_states_are_those_of_stored_ones(classes):
    def gradients(reversible):
        jet = Jet((1, 8, 8), 2, 6, 1, 8, 2, context_channels=classes, reversible=reversible)
        assert jet.chain.reversible == reversible
        jet.load_state_dict(weights)
        (z,), logdet = jet.double()(x, *context)
        return torch.autograd.grad(z.pow(3).sum() + logdet.sum(), [*jet.parameters()])

    weights = perturbed(Jet((1, 8, 8), 2, 6, 1, 8, 2, context_channels=classes)).state_dict()
    x, context = (
        normal(4, 1, 8, 8, dtype=torch.float64),
        (torch.tensor([0, 2, 1, 0]),) * (classes > 0),
    )
    for got, want in zip(gradients(True), gradients(False), strict=True):
        assert_close(got, want, terms=10_000, scale=max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("classes", [0, 3])
def test_the_network_is_a_transformer_of_torch(classes):
    net = perturbed(TokenNetwork(2, 6, 4, 2, 8, 2, classes)).double()
    x, context = normal(3, 2, 2, 2, dtype=torch.float64), normal(3, classes, dtype=torch.float64)
    tokens = torch.cat([x.flatten(2).mT, context[:, None].expand(3, 4, classes)], 2)
    tokens = net.embed(tokens) + net.position
    for block in net.blocks:
        parts = {
            **{"norm1": block.attention_norm, "norm2": block.dense_norm},
            **{"linear1": block.dense[0], "linear2": block.dense[2]},
            "self_attn.out_proj": block.attention_out,
        }
        weights = {f"{k}.{n}": p for k, m in parts.items() for n, p in m.named_parameters()}
        packed = block.query_key_value
        weights |= {f"self_attn.in_proj_{n}": p for n, p in packed.named_parameters()}
        plain = nn.TransformerEncoderLayer(
            8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
        )
        plain.load_state_dict(weights)
        tokens = plain(tokens)
    want = net.out(net.norm(tokens)).mT.unflatten(2, (2, 2))
    assert_close(net(x, *([context] if classes else [])), want, terms=1000)


def test_a_new_flow_only_reorders():
    x = normal(2, 3, 8, 8)
    (z,), logdet = Jet((3, 8, 8), 2, 7, 1, 8, 2)(x)
    assert not logdet.any()
    assert torch.equal(z.flatten(1).sort().values, x.flatten(1).sort().values)


def test_the_seed_orders_the_channels_and_weights_carry_the_order():
    def jet(seed):
        return Jet((1, 8, 8), 2, 3, 1, 8, 2, seed=seed)

    x = normal(2, 1, 8, 8)
    first, again, other = jet(0), jet(0), jet(1)
    assert torch.equal(first(x)[0][0], again(x)[0][0])
    assert not torch.equal(first(x)[0][0], other(x)[0][0])
    other.load_state_dict(first.state_dict())
    assert torch.equal(first(x)[0][0], other(x)[0][0])


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_64_couplings(autocast):
    """States and log-determinants are float32. Each coupling rounds a state, and in bfloat16 it
    may also round the input of its network to another number, which changes the output by 2^-8."""
    jet, width, std = Jet((1, 8, 8), 2, 64, 1, 16, 2), 16, 0.02
    for name, parameter in jet.named_parameters():
        if ".out." in name:
            nn.init.normal_(parameter, std=std)
    x = normal(4, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (z,), logdet = jet(x)
        back, negative = jet.inverse((z,))
        (z.square().sum() - logdet.sum()).backward()
    assert z.dtype == back.dtype == logdet.dtype == torch.float32
    largest = 4 * std * width**0.5  # output of a network
    error = 2**-24 * z.abs().max() + (2**-8 * largest if autocast else 0)
    assert (back - x).abs().max() < 64 * error
    assert jet.chain.drift < 64 * error
    assert (negative + logdet).abs().max() < 64 * error * z[0].numel()


@compiles
def test_a_stored_flow_compiles_whole():
    torch.compiler.reset()
    jet = perturbed(Jet((1, 4, 4), 2, 2, 1, 8, 2, reversible=False)).double()
    x = normal(2, 1, 4, 4, dtype=torch.float64)
    got = torch.compile(jet, backend="aot_eager", fullgraph=True)(x)
    for a, b in zip((*got[0], got[1]), (*jet(x)[0], jet(x)[1]), strict=True):
        assert_close(a, b, terms=1000)
