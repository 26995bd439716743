"""Jet, compared with one that is written here from the paper (arXiv 2412.15129): masks instead of
permuted states, torch's own transformer layers, and every activation stored."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import compiles, normal, perturbed
from torch import Tensor, nn

from mflow_kernels import Jet, Permutation
from mflow_kernels.models.jet import TokenNetwork
from mflow_kernels.testing import assert_close, check_bijection


class PlainJet(nn.Module):
    """A Jet that takes only its weights and orders of channels from another."""

    def __init__(self, jet: Jet) -> None:
        super().__init__()
        c, h, w = jet.latent_shapes[0]
        white = ((torch.arange(h)[:, None] + torch.arange(w)) % 2 == 0).flatten()
        order, spatial = torch.arange(c), 0
        layers = jet.chain.layers
        orders = (m.index for m in layers if isinstance(m, Permutation) and len(m.index) == c)
        self.read: list[Tensor] = []  # by each coupling: the masks (T, C) of what its network reads
        self.orders: list[Tensor] = []  # of the channels, as the network reads and returns them
        self.nets = nn.ModuleList()
        for i, net in enumerate(m for m in jet.modules() if isinstance(m, TokenNetwork)):
            mask = torch.zeros(h * w, c, dtype=torch.bool)
            if i % 3 == 2:
                mask[white if spatial % 2 == 0 else ~white] = True
                spatial += 1
            else:
                order = order[next(orders)]
                mask[:, order[: c // 2]] = True
            self.read.append(mask)
            self.orders.append(order)
            self.nets.append(plain_transformer(net, jet.heads))

    def couple(self, i: int, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """log s and the shift (N, T, C) of coupling i, 0 where it reads."""
        read, order = self.read[i], self.orders[i]
        tokens, changed = read.any(1), (~read).any(1)
        a, b = order.tensor_split([len(order) // 2]) if tokens.all() else (order, order)
        seen = x[:, tokens][:, :, a]
        if context is not None:
            seen = torch.cat([seen, context[:, None].expand(-1, seen.shape[1], -1)], 2)
        raw, shift = self.nets[i](seen).chunk(2, dim=2)
        parts = []
        for part in (torch.log(2 * torch.sigmoid(raw)), shift):
            parts.append(torch.zeros_like(x))
            parts[-1][:, changed.nonzero(), b] = part
        return parts[0], parts[1]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logdet = x.new_zeros(len(x))
        for i in range(len(self.nets)):
            log_s, shift = self.couple(i, x, context)
            x = (x + shift) * log_s.exp()
            logdet = logdet + log_s.flatten(1).sum(1)
        return x[:, :, self.orders[-1]], logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        x = torch.empty_like(z)
        x[:, :, self.orders[-1]] = z
        for i in reversed(range(len(self.nets))):
            log_s, shift = self.couple(i, x, context)
            x = x / log_s.exp() - shift
        return x


class AddedPosition(nn.Module):
    def __init__(self, position: Tensor) -> None:
        super().__init__()
        self.position = nn.Parameter(position.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.position


def plain_transformer(net: TokenNetwork, heads: int) -> nn.Module:
    """The network on tokens (N, T, C), of torch's own layers with the same weights."""
    width = net.embed.out_features
    blocks = []
    for block in net.blocks:
        plain = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        parts = {
            "norm1": block.attention_norm,
            "norm2": block.dense_norm,
            "linear1": block.dense[0],
            "linear2": block.dense[2],
            "self_attn.out_proj": block.attention_out,
        }
        weights = {f"{k}.{n}": p for k, m in parts.items() for n, p in m.named_parameters()}
        packed = block.query_key_value
        weights |= {f"self_attn.in_proj_{n}": p for n, p in packed.named_parameters()}
        plain.load_state_dict(weights)
        blocks.append(plain)
    return copy.deepcopy(
        nn.Sequential(net.embed, AddedPosition(net.position), *blocks, net.norm, net.out)
    )


def tokens_of(x: Tensor, patch: int) -> Tensor:
    """(N, C, H, W) -> (N, T, C * patch^2)."""
    for _ in range(patch.bit_length() - 1):
        x = F.pixel_unshuffle(x, 2)
    return x.flatten(2).mT


SETUPS = {
    "grey": ((1, 8, 8), 2, 6),
    "colour, patches of 4": ((3, 8, 16), 4, 4),
    "odd numbers of channels and rows": ((3, 3, 4), 1, 7),
}


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_values_and_gradients_are_those_of_the_paper(setup, classes, reversible):
    shape, patch, couplings = setup
    jet = Jet(shape, patch, couplings, 2, 8, 2, context_channels=classes, reversible=reversible)
    jet = perturbed(jet).double()
    plain = PlainJet(jet).double()
    x = normal(4, *shape, dtype=torch.float64)
    given = (torch.tensor([0, 2, 1, 0]),) if classes else ()
    context = F.one_hot(given[0]).double() if classes else None
    (z,), logdet = jet(x, *given)
    want, want_logdet = plain(tokens_of(x, patch), context)
    assert_close(z.flatten(2).mT, want, terms=10_000, scale=want.abs().max().item())
    assert_close(logdet, want_logdet, terms=10_000, scale=want_logdet.abs().max().item())
    latent = normal(4, *jet.latent_shapes[0], dtype=torch.float64)
    image, back = jet.inverse((latent,), *given), plain.inverse(latent.flatten(2).mT, context)
    assert_close(tokens_of(image[0], patch), back, terms=10_000, scale=back.abs().max().item())

    (z.pow(3).sum() + logdet.sum()).backward()
    (want.pow(3).sum() + want_logdet.sum()).backward()
    positions = [p for n, p in jet.named_parameters() if n.endswith("position")]
    wants = [p for n, p in plain.named_parameters() if n.endswith("position")]
    assert len(positions) == len(wants) == couplings
    got_sums = [p.grad.square().sum() for p in jet.parameters()]
    want_sums = [p.grad.square().sum() for p in plain.parameters()]
    scale = max(p.grad.abs().max().item() for p in plain.parameters())
    for p, q in zip(positions, wants, strict=True):
        assert_close(p.grad, q.grad, terms=10_000, scale=scale)
    total = torch.stack(want_sums).sum()
    assert_close(torch.stack(got_sums).sum(), total, terms=10_000, scale=total.item())


@pytest.mark.parametrize("reversible", [True, False])
def test_jacobian(reversible, device):
    jet = Jet((1, 4, 4), 2, 6, 1, 4, 2, reversible=reversible).to(device)
    check_bijection(jet, (2, 1, 4, 4))


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


def test_memory_is_flat_in_the_number_of_couplings():
    """The backward pass of a reversible flow holds the activations of one network."""

    def saved(couplings, reversible):
        jet = perturbed(
            Jet((3, 8, 8), 2, couplings, 2, 16, 2, reversible=reversible, checkpoint_every=None)
        )
        total = 0

        def pack(t):
            nonlocal total
            total += 0 if isinstance(t, nn.Parameter) else t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            jet(normal(2, 3, 8, 8))
        return total

    state = 2 * 3 * 8 * 8 * 4
    assert saved(24, True) - saved(6, True) < 18 * state / 8  # only log-determinants
    assert saved(24, False) > 3.5 * saved(6, False) > 50 * state


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


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image_shape": (8, 8)}, ValueError, r"image_shape: expected \(C, H, W\), got \(8, 8\)"),
        ({"image_shape": (1, 8, 6)}, ValueError, "width divisible by 2 .* = 4, got 8x6"),
        ({"image_shape": (1, 7, 8)}, ValueError, "height divisible by patch = 2 .* got 7x8"),
        ({"patch": 3}, ValueError, "patch: expected a power of 2, got 3"),
        ({"patch": 0}, ValueError, "patch: expected at least 1, got 0"),
        ({"patch": 1}, ValueError, "patch: expected at least 2 for images with one channel, got 1"),
        ({"couplings": 0}, ValueError, "couplings: expected at least 1, got 0"),
        ({"depth": 1.0}, TypeError, "depth: expected a whole number, got float"),
        ({"heads": 3}, ValueError, "width: expected a multiple of heads = 3, got 8"),
        ({"context_channels": -1}, ValueError, "context_channels: expected at least 0, got -1"),
    ],
)
def test_bad_arguments(changes, error, message):
    arguments = {"image_shape": (1, 8, 8), "patch": 2, "couplings": 2, "depth": 1, "width": 8}
    with pytest.raises(error, match=message):
        Jet(**{**arguments, "heads": 2, **changes})


def test_inputs_that_do_not_fit():
    jet = Jet((1, 8, 8), 2, 2, 1, 8, 2, context_channels=3)
    x = normal(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"x: expected shape \(N, 1, 8, 8\), got \(2, 1, 8, 6\)"):
        jet(x[..., :6])
    with pytest.raises(TypeError, match=r"context: expected classes, vectors \(N, 3\) or maps"):
        jet(x)
    with pytest.raises(ValueError, match="context: expected classes from 0 to 2, got 1 to 3"):
        jet(x, torch.tensor([1, 3]))
