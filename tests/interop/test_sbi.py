"""sbi's estimators and its quickstart run accelerated."""

import copy
import warnings

import pytest
import torch

from interop import peers
from mflow_kernels.interop import accelerate, decelerate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    inference = pytest.importorskip("sbi.inference")
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform

pytestmark = pytest.mark.filterwarnings("ignore")


def simulated(dims, n=200):
    """The quickstart's simulator: parameters plus Gaussian noise."""
    prior = BoxUniform(low=-2 * torch.ones(dims), high=2 * torch.ones(dims))
    theta = prior.sample((n,))
    return prior, theta, theta + 1.0 + 0.1 * torch.randn_like(theta)


ALL = {
    "nsf": "scale and shift, 10 permutations, 5 spline couplings, 5 1x1 convolutions",
    "maf": "scale and shift, 5 autoregressive affine maps, 5 permutations",
    "maf_rqs": "scale and shift, 5 autoregressive splines, 5 permutations",
}


def results(theta, x):
    def of(model):
        state, condition = (t.double().requires_grad_() for t in (theta, x))
        log_prob = model.log_prob(state[None], condition)
        out = {"log_prob": log_prob, "dx": peers.input_gradient(condition, [log_prob])}
        out["d theta"] = peers.input_gradient(state, [log_prob])
        torch.manual_seed(1)
        with peers.default_dtype(torch.float64):  # that of nflows' draws
            return out | {"samples": model.sample((4,), condition[:5])}

    return of


@pytest.mark.parametrize(
    ("kind", "dims"),
    [
        ("nsf", 3),
        ("nsf", 2),
        ("nsf", 1),
        ("maf", 3),
        ("maf_rqs", 3),
        ("zuko_nsf", 3),
        ("zuko_maf", 3),
    ],
)
def test_an_estimator_equals_the_original(kind, dims):
    torch.manual_seed(0)
    _, theta, x = simulated(dims)
    model = peers.perturbed(posterior_nn(model=kind)(theta, x)).double()
    fast = peers.assert_equals_original(model, results(theta, x), 1)
    report = accelerate(fast)
    if kind in ALL and dims == 3:
        assert [r.by for r in report.replaced] == [ALL[kind]]
        assert not report.left


@pytest.mark.parametrize("kind", ["nsf", "maf", "zuko_nsf"])
def test_the_quickstart(kind, tmp_path, monkeypatch):
    """An accelerated estimator is trained, samples and is copied; decelerated, it is the same."""
    monkeypatch.chdir(tmp_path)  # sbi writes its logs here
    torch.manual_seed(0)
    prior, theta, x = simulated(3)
    reports = []

    def build(theta, x):
        estimator = posterior_nn(model=kind)(theta, x)
        reports.append(accelerate(estimator))
        return estimator

    trainer = inference.NPE(prior, density_estimator=build, show_progress_bars=False)
    trained = trainer.append_simulations(theta, x).train(max_num_epochs=4, training_batch_size=50)
    losses = trainer.summary["training_loss"]
    assert losses[-1] < losses[0] - 0.1
    assert reports[0].replaced
    posterior = trainer.build_posterior(trained)
    observed = torch.full((3,), 0.5)
    samples = posterior.sample((50,), x=observed, show_progress_bars=False)
    assert samples.shape == (50, 3)
    values = [
        p.log_prob(samples, x=observed, norm_posterior=False)
        for p in (posterior, copy.deepcopy(posterior))
    ]
    torch.testing.assert_close(*values)
    plain = copy.deepcopy(trained)
    decelerate(plain)
    peers.assert_equals_original(plain.double(), results(theta, x), 1)
