"""Models that are saved without a run, and loaded again."""

import json

import pytest
import torch
from cases import normal, perturbed

from mflow_kernels import (
    ErrorBound,
    Glow,
    HierarchicalFlow,
    ManifoldFlow,
    ManifoldObjective,
    VectorFlow,
    WeightSchedule,
)
from mflow_kernels.layers.networks import coupling_net


def model(weight=10.0, scale="tanh", **flow) -> HierarchicalFlow:
    glow = Glow((1, 4, 4), 2, 1, 4, scale=scale, **flow)
    mask = (torch.rand(2, 2, 2) < 0.5, torch.rand(8, 1, 1) < 0.5)
    mask[0][0, 0, 0] = mask[1][0] = True
    image = ManifoldFlow(glow, mask=mask, objective=ManifoldObjective("data", "l2", weight))
    dim = image.manifold_dim
    vector = ManifoldFlow(
        VectorFlow(dim, 2, 3, **flow), 1, objective=ManifoldObjective("latent", "huber", 3.0, 0.5)
    )
    return perturbed(HierarchicalFlow([image, vector]))


WEIGHTS = [10.0, "variance", WeightSchedule(100.0, 5.0, 30), ErrorBound(0.01), ErrorBound(0.1, 7.0)]


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_a_saved_model_loads_with_the_same_bits(weight, tmp_path):
    saved = model(weight, context_channels=2)
    saved.n_bits, saved.crop, saved.class_names = 5, 148, ("cat", "dog")
    saved.save_pretrained(tmp_path / "model")
    loaded = HierarchicalFlow.from_pretrained(tmp_path / "model")
    assert (loaded.n_bits, loaded.crop, loaded.class_names) == (5, 148, ("cat", "dog"))
    assert not loaded.training
    saved.eval()
    x, classes = normal(3, 1, 4, 4), torch.tensor([0, 1, 1])
    assert torch.equal(loaded.log_prob(x, context=classes), saved.log_prob(x, context=classes))
    for stage in range(2):
        got, want = (m.terms(x, stage=stage, context=classes) for m in (loaded, saved))
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]  # no temporary folder is left
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    contents = [json.loads((f / "model.json").read_text()) for f in (tmp_path / "model", again)]
    assert contents[0] == contents[1]


def test_one_stage(tmp_path):
    image = model().stages[0]
    image.n_bits = 8
    image.save_pretrained(str(tmp_path / "model"))
    loaded = ManifoldFlow.from_pretrained(tmp_path / "model")
    x = normal(3, 1, 4, 4)
    assert torch.equal(loaded.encode(x), image.encode(x))
    assert loaded.n_bits == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model(scale="exp"), r"stages\[0\].scale: expected the default scale function"),
        (
            lambda: model(network=lambda i, o: coupling_net(i, o, 4, 2 if i < 9 else 0)),
            r"stages\[0\].network: expected built-in networks",
        ),
        (lambda: model(torch.ones(4, 4)), r"stages\[0\].weight: expected a weight that is no map"),
        (
            lambda: HierarchicalFlow([ManifoldFlow(VectorFlow(3, 1, 4), 2)]),
            r"stages\[0\].flow: expected Glow, got VectorFlow; save the state_dict",
        ),
        (lambda: model().double(), "model: expected parameters of dtype float32 to save"),
    ],
)
def test_what_cannot_be_saved(make, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        make().save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=r"folder: expected a new folder, but .* exists"):
            model().save_pretrained(folder)
    with pytest.raises(ValueError, match=r"folder: cannot write .*none/model"):
        model().save_pretrained(tmp_path / "none" / "model")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_bits", 9), ("n_bits", "8"), ("crop", 0), ("class_names", ["a"]), ("class_names", [1, 2])],
)
def test_damaged_descriptions_of_images(name, value, tmp_path):
    saved = model(context_channels=2)
    saved.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match="with n_bits, crop, classes and class_names of an export"):
        HierarchicalFlow.from_pretrained(tmp_path / "model")
