"""Data-dependent initialization inside the caller's own bijections, and the warning without it."""

import copy

import pytest
import torch
from cases import normal, perturbed

from layers.chains import InSequence
from mflow_kernels import ActNorm, FlowStep, Glow, ReversibleChain

WARNING = r"ActNorm was never initialized .* call initialize\(x\) of the model with a first batch"


def step(**options):
    return FlowStep(3, width=4, spatial_dims=0, **options)


def actnorms(model):
    return [m for m in model.modules() if isinstance(m, ActNorm)]


def test_initialize_reaches_the_layers_of_a_bijection():
    """The layers are set as if each had been initialized from the output of the one before it."""
    own = perturbed(InSequence(step(), InSequence(ActNorm(3)), ReversibleChain([step(), step()])))
    by_hand = copy.deepcopy(own)
    x = 3 + 2 * normal(64, 3)
    z, logdet = own.initialize(x)
    state = by_hand.layers[0].initialize(x)[0]
    state = by_hand.layers[1].layers[0].initialize(state)[0]
    by_hand.layers[2].initialize(state)
    assert len(actnorms(own)) == 4
    assert all(layer.initialized for layer in actnorms(own))
    torch.testing.assert_close(own.state_dict(), by_hand.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close((z, logdet), by_hand(x), rtol=0, atol=0)
    assert not any(m._forward_pre_hooks for m in own.modules())


def test_initialize_passes_the_context():
    own = InSequence(step(context_channels=2), step(context_channels=2))
    x, context = 3 + normal(16, 3), normal(16, 2)
    own.initialize(x, context)
    assert all(layer.initialized for layer in actnorms(own))


def test_a_failed_initialization_leaves_no_hook():
    own = InSequence(step(), step())
    with pytest.raises(ValueError, match="x: expected at least two values a channel"):
        own.initialize(normal(1, 3))
    assert not any(m._forward_pre_hooks for m in own.modules())
    own.initialize(normal(8, 3))
    assert all(layer.initialized for layer in actnorms(own))


MODELS = {
    "step": (step, (4, 3)),
    "chain": (lambda: ReversibleChain([step(), step()]), (4, 3)),
    "actnorm": (lambda: ActNorm(3), (4, 3)),
    "image flow": (lambda: Glow((1, 4, 4), 1, 1, 4), (4, 1, 4, 4)),
    "own bijection": (lambda: InSequence(step()), (4, 3)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("make", "shape"), MODELS.values(), ids=MODELS)
def test_training_without_initialization_warns_once(make, shape):
    model, x = make(), normal(*shape)
    model.eval()(x)  # no training
    with torch.no_grad():
        model.train()(x)
    with pytest.warns(UserWarning, match=WARNING) as seen:
        model(x)
    assert len(seen) == 1
    model(x)
    initialized, loaded = make(), make()
    initialized.initialize(x)
    loaded.load_state_dict(initialized.state_dict())
    frozen = make().requires_grad_(False)  # not trained
    for one in (initialized, loaded, frozen):
        one(x)
