"""Single layers inside a user's model behave as modules should."""

import copy

import pytest
import torch
from layers.chains import InSequence
from torch import nn

from mflow_kernels import ActNorm, AffineCoupling, FlowStep, Glow, InvertibleConv1x1
from mflow_kernels.testing import assert_close, check_bijection

SHAPES = {0: (3, 6), 1: (3, 6, 5), 2: (3, 6, 4, 5), 3: (3, 6, 2, 3, 2)}


def user_flow():
    """A user's model, with a condition for the layers that take one."""
    couplings = AffineCoupling(6, Conditioned()), FlowStep(6, Conditioned())
    return InSequence(ActNorm(6), InvertibleConv1x1(6), *couplings)


class Conditioned(nn.Module):
    """A network applied to each pixel, shifted by a condition (N, 2) if given."""

    def __init__(self):
        super().__init__()
        self.condition = nn.Linear(2, 6)
        self.net = nn.Linear(3, 6)

    def forward(self, x, condition=None):
        out = self.net(x.movedim(1, -1)).movedim(-1, 1)
        if condition is not None:
            out = out + self.condition(condition).view(len(x), 6, *(1,) * (x.dim() - 2))
        return out


@pytest.mark.parametrize("dims", SHAPES)
def test_every_shape(dims):
    check_bijection(user_flow(), (2, *SHAPES[dims][1:]))


@pytest.mark.parametrize("dims", SHAPES)
def test_conditions(dims):
    flow, x = user_flow(), torch.randn(SHAPES[dims])
    one, other = torch.randn(3, 2), torch.randn(3, 2)
    z, logdet = flow(x, one)
    assert not torch.allclose(z, flow(x, other)[0])
    back, logdet_back = flow.inverse(z, one)
    assert_close(back, x, terms=100)
    assert_close(logdet_back, -logdet, terms=100, scale=10.0)
    flow(x, one.requires_grad_())[1].sum().backward()
    assert one.grad is not None
    assert one.grad.any()


def test_moves_between_dtypes_and_devices():
    flow, x = user_flow(), torch.randn(SHAPES[2])
    z, logdet = flow.double()(x.double())
    assert z.dtype == logdet.dtype == torch.float64
    single, _ = flow.float()(x)
    assert single.dtype == torch.float32
    assert_close(single, z, terms=100)
    flow.to("meta")
    assert {t.device.type for t in flow.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    "layer", [InvertibleConv1x1(6), FlowStep(6, width=4)], ids=["conv1x1", "step"]
)
def test_infers_shapes_on_the_meta_device(layer):
    layer = copy.deepcopy(layer).to("meta")
    z, logdet = layer(torch.empty(2, 6, 4, 4, device="meta"))
    back, logdet_back = layer.inverse(z)
    assert z.shape == back.shape == (2, 6, 4, 4)
    assert logdet.shape == logdet_back.shape == (2,)


def test_apply_and_parameter_iterators():
    flow = user_flow()
    met = []
    flow.apply(lambda m: met.append(type(m)))
    assert met.count(ActNorm) == met.count(InvertibleConv1x1) == met.count(AffineCoupling) == 2
    flow.apply(lambda m: nn.init.zeros_(m.weight) if isinstance(m, nn.Linear) else None)
    assert not flow.layers[2].net.net.weight.any()
    flow.requires_grad_(False)
    assert not flow(torch.randn(SHAPES[2]))[1].requires_grad
    flow.layers[3].actnorm.requires_grad_(True)
    z, logdet = flow(torch.randn(SHAPES[2]))
    (z.sum() + logdet.sum()).backward()
    trained = [name for name, p in flow.named_parameters() if p.grad is not None]
    assert trained == ["layers.3.actnorm.bias", "layers.3.actnorm.log_scale"]


def test_state_dicts_name_what_they_hold():
    names = set(FlowStep(6, width=4).state_dict())
    assert {"actnorm.bias", "conv.lower", "conv.permutation", "coupling.net.0.weight"} <= names
    with pytest.raises(RuntimeError, match=r"Missing key.*actnorm.bias"):
        FlowStep(6, width=4).load_state_dict({})


class Sampling(nn.Module):
    """Map latents to data."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, *latents):
        return self.flow.inverse(latents if isinstance(self.flow, Glow) else latents[0])[0]


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (lambda: ActNorm(6), [(2, 6, 4, 4)]),
        (lambda: InvertibleConv1x1(6), [(2, 6, 4, 4)]),
        (lambda: FlowStep(6, width=4, spatial_dims=0), [(2, 6)]),
        (lambda: user_flow(), [(2, 6, 4, 4)]),
        (lambda: Glow((1, 8, 8), levels=2, steps=2, width=4), [(2, 2, 4, 4), (2, 8, 2, 2)]),
    ],
    ids=["actnorm", "conv1x1", "step", "user's", "glow"],
)
def test_exports_sampling(make, shapes):
    sampling = Sampling(make()).eval()
    latents = tuple(torch.randn(shape) for shape in shapes)
    with torch.no_grad():
        program = torch.export.export(sampling, latents)
    got = program.module()(*latents)
    assert_close(got, sampling(*latents), terms=100)
