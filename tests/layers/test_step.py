import pytest
import torch
from cases import compiles, normal, perturbed

from mflow_kernels import FlowStep, ReversibleChain
from mflow_kernels.layers.folding import fold
from mflow_kernels.testing import assert_close


def perturbed_steps(channels, count=1, **options):
    """Perturbed steps in float64."""
    steps = [FlowStep(channels, width=4, **options).double() for _ in range(count)]
    return [perturbed(step, 0.2) for step in steps]


def one_by_one(steps, x):
    """The reference: actnorm, convolution and coupling as separate layers."""
    total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for step in steps:
        for layer in (step.actnorm, step.conv, step.coupling):
            x, logdet = layer(x)
            total = total + logdet
    return x, total


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("scale", ["tanh", "sigmoid"])
@pytest.mark.parametrize(("shape", "dims"), [((3, 5), 0), ((2, 3, 4, 3), 2)], ids=str)
def test_equals_its_layers_in_sequence(shape, dims, scale, reversible, device):
    steps = perturbed_steps(shape[1], 2, spatial_dims=dims, scale=scale)
    chain = ReversibleChain(steps, reversible=reversible).to(device)
    x = normal(*shape, dtype=torch.float64, device=device).requires_grad_()
    leaves = [x, *chain.parameters()]
    results = []
    for z, logdet in (chain(x), one_by_one(steps, x)):
        loss = (z * torch.arange(1, z[0].numel() + 1, device=device).view(z[0].shape)).sum()
        results.append([z, logdet, *torch.autograd.grad(loss + logdet.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        # Sums over samples, pixels and channels, through networks of two more layers each.
        size = max(1.0, want.abs().max().item())
        assert_close(got, want, terms=10_000, scale=size)


def test_a_steps_gradients_are_not_rounded_to_its_neighbours_dtype():
    steps = [step.float() for step in perturbed_steps(4, 2)]
    factors = [*steps[1].conv.parameters(), *steps[1].actnorm.parameters()]

    def gradients():
        weight, bias, log_det = fold([step.linear for step in steps], torch.float32)
        loss = weight[1].pow(3).sum() + bias[1].pow(3).sum() + log_det
        return torch.autograd.grad(loss, factors)

    wants = gradients()
    steps[0].conv.bfloat16()
    steps[0].actnorm.bfloat16()
    torch.testing.assert_close(gradients(), wants, rtol=0, atol=0)


@pytest.mark.long
@compiles
def test_compiles_with_inductor(device):
    """A vector step with the real backend; other tests use aot_eager."""
    torch.compiler.reset()
    (step,) = perturbed_steps(4, spatial_dims=0)
    step.to(device)
    x = normal(8, 4, dtype=torch.float64, device=device).requires_grad_()
    leaves = [x, *step.parameters()]
    results = []
    for call in (step, torch.compile(step, fullgraph=True)):
        z, logdet = call(x)
        results.append(
            [z, logdet, *torch.autograd.grad((z.square().sum(1) + logdet).sum(), leaves)]
        )
    for got, want in zip(*results, strict=True):
        assert_close(got, want, terms=10_000, scale=max(1.0, want.abs().max().item()))
