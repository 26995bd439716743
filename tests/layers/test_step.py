import pytest
import torch
from cases import compiles, normal, perturbed

from layers.chains import InSequence, assert_all_close, gradients
from mflow_kernels import FlowStep, ReversibleChain
from mflow_kernels.layers.folding import ActNormConv
from mflow_kernels.reversible.program import Program


def perturbed_steps(channels, count=1, **options):
    """Perturbed steps in float64."""
    steps = [FlowStep(channels, width=4, **options).double() for _ in range(count)]
    return [perturbed(step, 0.2) for step in steps]


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize(
    ("shape", "dims", "scale"), [((3, 5), 0, "tanh"), ((2, 3, 4, 3), 2, "sigmoid")], ids=str
)
def test_equals_its_layers_in_sequence(shape, dims, scale, reversible, device):
    """Actnorm, 1x1 convolution and coupling in a chain compute as a step, in as few launches."""
    steps = perturbed_steps(shape[1], 2, spatial_dims=dims, scale=scale)
    layers = [part for step in steps for part in (step.actnorm, step.conv, step.coupling)]
    x = normal(*shape, dtype=torch.float64, device=device)
    chains = [
        ReversibleChain(steps, reversible=reversible),
        ReversibleChain(layers, reversible=reversible),
        InSequence(*layers),
    ]
    of_steps, of_layers, want = (gradients(c, x, call=c.to(device)) for c in chains)
    assert all(map(torch.equal, of_steps, of_layers))
    # Sums over samples, pixels and channels, through networks of two more layers each.
    assert_all_close(of_steps, want, terms=10_000)
    (instruction,) = Program(chains[1].instructions()).instructions
    assert len(instruction.steps) == 2


def test_a_steps_gradients_are_not_rounded_to_its_neighbours_dtype():
    steps = [step.float() for step in perturbed_steps(4, 2)]
    factors = [*steps[1].conv.parameters(), *steps[1].actnorm.parameters()]

    def gradients():
        linear, how = [step.linear for step in steps], {"inverted": False, "check": False}
        weight, bias, log_det = ActNormConv.fold(linear, ["", ""], torch.float32, **how)
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
    x = normal(8, 4, dtype=torch.float64, device=device)
    compiled = torch.compile(step, fullgraph=True)
    got, want = (gradients(step, x, call=call) for call in (compiled, step))
    assert_all_close(got, want, terms=10_000)
