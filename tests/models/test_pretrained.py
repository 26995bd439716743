"""Models that are saved without a run, and loaded again."""

import copy
import json
import re
from operator import setitem

import pytest
import torch
from cases import normal, perturbed
from safetensors.torch import load_file, save_file
from torch import nn

from mflow_kernels import (
    ActNorm,
    AffineCoupling,
    ErrorBound,
    FlowStep,
    GaussianMixture,
    Glow,
    HierarchicalFlow,
    InvertibleConv1x1,
    Jet,
    ManifoldFlow,
    ManifoldObjective,
    MaskedAutoregressive,
    Permutation,
    PixelPairs,
    ReversibleChain,
    SplineCoupling,
    Split,
    Squeeze,
    Unsqueeze,
    VectorFlow,
    WeightSchedule,
)
from mflow_kernels.models import architecture
from mflow_kernels.ops.scale import ScaleFunction

IMAGE, POINT = (1, 4, 4), (3,)


def model(weight=10.0, **flow) -> HierarchicalFlow:
    """A hierarchy whose latents are chosen at random."""
    glow = Glow(IMAGE, 2, 1, 4, **flow)
    mask = (torch.rand(2, 2, 2) < 0.5, torch.rand(8, 1, 1) < 0.5)
    mask[0][0, 0, 0] = mask[1][0] = True
    image = ManifoldFlow(glow, mask=mask, objective=ManifoldObjective("data", "l2", weight))
    dim = image.manifold_dim
    vector = ManifoldFlow(
        VectorFlow(dim, 2, 3, **flow), 1, objective=ManifoldObjective("latent", "huber", 3.0, 0.5)
    )
    return HierarchicalFlow([image, vector])


def chain(shape=IMAGE, **options) -> ReversibleChain:
    layers = [Squeeze(), FlowStep(4, width=5, scale="sigmoid"), Split(4, width=3), FlowStep(2)]
    if shape == POINT:
        layers = [FlowStep(3, width=4, spatial_dims=0), FlowStep(3, width=2, spatial_dims=0)]
    return ReversibleChain(layers, input_shape=shape, **options)


MODELS = {
    "glow": lambda: Glow(IMAGE, 2, 1, 4),
    "glow of three sizes": lambda: Glow((3, 8, 4), 1, 2, 4, checkpoint_every=None),
    "glow with another scale": lambda: Glow(IMAGE, 1, 1, scale=ScaleFunction("atan", clamp=1.7)),
    "conditional glow": lambda: Glow(IMAGE, 2, 1, 4, context_channels=2),
    "float64 glow": lambda: Glow(IMAGE, 2, 1, 4).double(),
    "jet": lambda: Jet((3, 2, 4), 1, 3, 1, 4, 2, seed=3, scale="exp", checkpoint_every=None),
    "conditional jet": lambda: Jet(IMAGE, 2, 2, 1, 4, 2, context_channels=2),
    "vectors": lambda: VectorFlow(3, 2, 4, reversible=False),
    "conditional vectors": lambda: VectorFlow(3, 2, 4, context_channels=2, scale="exp"),
    "spline vectors": lambda: VectorFlow(4, 2, 4, coupling="spline", bins=3),
    "spline glow": lambda: Glow(IMAGE, 1, 1, 4, coupling="spline"),
    "conditional autoregressive vectors": lambda: VectorFlow(
        3, 3, 5, autoregressive=True, context_channels=2
    ),
    "autoregressive spline vectors": lambda: VectorFlow(
        3, 2, 5, coupling="spline", bins=3, autoregressive=True
    ),
    "autoregressive chain": lambda: ReversibleChain(
        [
            MaskedAutoregressive(
                3, width=4, depth=1, residual=False, activation="elu", order=[1, 2, 0]
            ),
            MaskedAutoregressive(
                3, "spline", width=4, bins=3, bound=(-2.0, 3.0), tails="circular", min_slope=0.01
            ),
        ],
        input_shape=POINT,
    ),
    "chain": chain,
    "chain of points": lambda: chain(POINT, reversible=False, checkpoint_every=2),
    "chain of other layers": lambda: ReversibleChain(
        [
            *(ActNorm(1), PixelPairs("checkerboard"), Permutation([1, 0]), InvertibleConv1x1(2)),
            *(AffineCoupling(2, width=3), PixelPairs("checkerboard", inverted=True), Squeeze()),
            *(SplineCoupling(4, bins=3, width=3, bound=(-2.0, 3.0)), Split(4, width=3, kept=3)),
            Split(3, kept=2, prior=False),
        ],
        input_shape=IMAGE,
    ),
    "chain that unsqueezes": lambda: ReversibleChain(
        [Squeeze(), FlowStep(4, width=3), Unsqueeze()], input_shape=IMAGE
    ),
    "chain of sequences": lambda: ReversibleChain(
        [
            *(PixelPairs("neighbours"), InvertibleConv1x1(4, n_split=2)),
            AffineCoupling(4, width=3, scale=None, spatial_dims=1),
        ],
        input_shape=(2, 6),
    ),
    "manifold of glow": lambda: model().stages[0],
    "manifold of vectors": lambda: ManifoldFlow(VectorFlow(3, 1, 4), 2),
    "manifold of a chain": lambda: ManifoldFlow(chain(), 5),
    "a manifold of no dimension": lambda: ManifoldFlow(
        VectorFlow(3, 1, 4), mask=(torch.zeros(3, dtype=torch.bool),)
    ),
    "hierarchy": model,
    "conditional hierarchy": lambda: model(context_channels=2),
    "hierarchy of vectors": lambda: HierarchicalFlow([ManifoldFlow(VectorFlow(3, 1, 4), 2)]),
    "mixture": lambda: ManifoldFlow(VectorFlow(3, 1, 4), 2, prior=GaussianMixture(2, 3)),
    "variance": lambda: model("variance"),
    "schedule": lambda: model(WeightSchedule(100.0, 5.0, 30)),
    "bound": lambda: model(ErrorBound(0.01)),
    "bound with a start": lambda: model(ErrorBound(0.1, 7.0)),
}


@pytest.mark.filterwarnings("ignore:mask:")
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_loads_with_the_same_bits(name, tmp_path):
    saved = perturbed(MODELS[name]())
    conditional = name.startswith("conditional")
    saved.n_bits, saved.crop = 5, 148
    saved.class_names = ("cat", "dog") if conditional else ()
    saved.save_pretrained(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]  # no temporary folder is left
    state = torch.random.get_rng_state()
    loaded = type(saved).from_pretrained(str(tmp_path / "model"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (loaded.n_bits, loaded.crop, loaded.class_names) == (5, 148, saved.class_names)
    assert not loaded.training
    saved.eval()
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    for key, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
        assert loaded.state_dict()[key].stride() == tensor.stride(), key
    x = normal(3, *saved.input_shape).to(next(saved.parameters()).dtype)
    context = torch.tensor([0, 1, 1]) if conditional else None
    assert torch.equal(loaded.log_prob(x, context=context), saved.log_prob(x, context=context))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    samples = [
        m.sample(3, generator=g, context=context)
        for m, g in zip((loaded, saved), generators, strict=True)
    ]
    assert torch.equal(*samples)
    for i in range(len(getattr(saved, "stages", ()))):
        got, want = (m.terms(x, stage=i, context=context) for m in (loaded, saved))
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    loaded.log_prob(x, context=context).sum().backward()  # its parameters can be trained
    loaded.save_pretrained(tmp_path / "again")
    files = [(tmp_path / f / "model.json").read_text() for f in ("model", "again")]
    assert files[0] == files[1]


@pytest.mark.filterwarnings("ignore:mask:")
def test_every_kind_is_in_the_table_above():
    """A class that gets a row must be saved by a test."""
    descriptions = json.dumps([architecture.describe(make()) for make in MODELS.values()])
    assert {*re.findall(r'"class": "(\w+)"', descriptions)} == architecture.KINDS.keys()


def tied_tensor() -> VectorFlow:
    flow = VectorFlow(3, 2, 4)
    flow.chain.layers[1].actnorm.bias = flow.chain.layers[0].actnorm.bias
    return flow


class MyGlow(Glow):
    pass


def glow(**options):
    return Glow(IMAGE, 2, 1, 4, **options)


def edited(edit):
    """A function that makes a Glow and calls `edit` with a step and its network."""

    def make():
        flow = glow()
        step = flow.chain.layers[1]
        edit(step, step.coupling.net)
        return flow

    return make


def own_net(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 1)


REFUSED = {
    "another activation": (
        edited(lambda step, net: setitem(net, 1, nn.SiLU())),
        r"chain.layers.1.coupling.net.1: .*ReLU, got SiLU",
    ),
    "another scale": (
        edited(lambda step, net: setattr(step.coupling, "scale", ScaleFunction("exp"))),
        r"chain.layers.1.coupling.scale: expected Scale",
    ),
    "a hook": (
        edited(lambda step, net: net.register_forward_hook(lambda *_: None)),
        r"chain.layers.1.coupling.net: expected no hooks",
    ),
    "another forward": (
        edited(lambda step, net: setattr(step, "forward", lambda x: (x, x.new_zeros(len(x))))),
        r"chain.layers.1: expected the forward",
    ),
    "a further layer": (
        edited(lambda step, net: net.append(nn.Identity())),
        r"chain.layers.1.coupling.net.5: expected nothing",
    ),
    "two dtypes": (
        edited(lambda step, net: step.double()),
        "numbers of one dtype, got torch.float32, torch.float64",
    ),
    "an own network": (lambda: glow(network=own_net), "network: expected built-in networks"),
    "an own network in a chain": (
        lambda: ReversibleChain([FlowStep(4, own_net(2, 4))]),
        r"layers\[0\].net: expected a network that coupling_net builds, got Conv2d",
    ),
    "a map of weights": (
        lambda: model(torch.ones(4, 4)),
        r"stages\[0\].objective.weight: .*no map",
    ),
    "a subclass": (lambda: MyGlow(IMAGE, 1, 1), "model: expected one of Glow, .* got MyGlow"),
    "a tied tensor": (tied_tensor, r"layers.1.actnorm.bias: .* that of chain.layers.0.actnorm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved_is_refused_by_name(name, tmp_path):
    make, message = REFUSED[name]
    with pytest.raises(TypeError, match=message) as caught:
        make().save_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("; save the state_dict of other models")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n_bits", 9), ("n_bits", "8"), ("crop", 0), ("class_names", ["a"])),
        *(("class_names", [1, 2]), ("dtype", "int8"), ("dtype", None), ("model", [])),
    ],
)
def test_values_of_no_model_are_neither_saved_nor_loaded(name, value, tmp_path):
    saved, path = model(context_channels=2), tmp_path / "model" / "model.json"
    saved.save_pretrained(path.parent)
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match=r"^folder: .*class_names"):
        HierarchicalFlow.from_pretrained(path.parent)
    if hasattr(saved, name):
        setattr(saved, name, value)
        with pytest.raises(ValueError, match="n_bits, crop, class_names: expected"):
            saved.save_pretrained(tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    flow = glow()
    flow.chain.layers[1].actnorm.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"finite .*, but chain.layers.1.actnorm.bias has others"):
        flow.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_class_is_refused(tmp_path):
    whole = model()
    names = {"whole": whole, "one": HierarchicalFlow([whole.stages[0]]), "image": whole.stages[0]}
    for name, saved in (names | {"glow": whole.stages[0].flow}).items():
        saved.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"folder: expected one stage in .*whole, got 2; load all"):
        ManifoldFlow.from_pretrained(tmp_path / "whole")
    with pytest.raises(
        ValueError, match=r"class VectorFlow in .*, got one of class Glow, which Gl"
    ):
        VectorFlow.from_pretrained(tmp_path / "glow")
    # A manifold flow and a hierarchy of one stage are the same model.
    x = normal(3, *IMAGE)
    loaded = [
        c.from_pretrained(tmp_path / n)
        for n in ("one", "image")
        for c in (ManifoldFlow, HierarchicalFlow)
    ]
    for each in loaded:
        assert torch.equal(each.log_prob(x), whole.stages[0].log_prob(x))


def test_the_callers_defaults_play_no_part(tmp_path):
    saved = model()
    saved.save_pretrained(tmp_path / "model")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            loaded = HierarchicalFlow.from_pretrained(tmp_path / "model")
    finally:
        torch.set_default_dtype(torch.float32)
    x = normal(3, *IMAGE)
    assert torch.equal(loaded.log_prob(x), saved.log_prob(x))


EARLIER = {
    "format": "mflow_kernels 1",
    "architecture": {
        **{"image_shape": [1, 4, 4], "levels": 2, "steps": 1, "width": 4, "classes": 2},
        "stages": [
            {
                **{"manifold_dim": 6, "steps": 1, "width": 4, "domain": "data", "rho": "l2"},
                **{"weight": 100.0, "final_weight": 5.0, "weight_steps": 30, "sigma": 1.0},
            },
            {
                **{"manifold_dim": 2, "steps": 2, "width": 3, "domain": "latent", "rho": "huber"},
                **{"weight": 3.0, "delta": 0.5},
            },
        ],
    },
    **{"n_bits": 5, "crop": None, "class_names": ["cat", "dog"]},
}


def test_a_folder_of_an_earlier_version(tmp_path):
    glow, how = Glow(IMAGE, 2, 1, 4, context_channels=2), WeightSchedule(100.0, 5.0, 30)
    first = ManifoldFlow(glow, 6, objective=ManifoldObjective("data", "l2", how, 1.0))
    objective = ManifoldObjective("latent", "huber", 3.0, 0.5, 0.1)
    second = ManifoldFlow(VectorFlow(6, 2, 3, context_channels=2), 2, objective=objective)
    whole = perturbed(HierarchicalFlow([first, second])).eval()
    tensors = {n: t.contiguous() for n, t in whole.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_text(json.dumps(EARLIER))
    loaded = HierarchicalFlow.from_pretrained(tmp_path)
    assert (loaded.n_bits, loaded.crop, loaded.class_names) == (5, None, ("cat", "dog"))
    x, classes = normal(3, *IMAGE), torch.tensor([0, 1, 1])
    for stage in range(2):
        got, want = (m.terms(x, stage=stage, context=classes) for m in (loaded, whole))
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert architecture.describe(loaded) == architecture.describe(whole)
    for name in ("weight_steps", "domain", "manifold_dim"):
        lacking = copy.deepcopy(EARLIER)
        del lacking["architecture"]["stages"][0][name]
        (tmp_path / "model.json").write_text(json.dumps(lacking))
        with pytest.raises(ValueError, match=f"folder: expected an architecture .*'{name}'"):
            HierarchicalFlow.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "missing"])
def test_folders_that_cannot_be_read_or_written(name, tmp_path):
    with pytest.raises(ValueError, match=r"folder: expected model.safetensors") as caught:
        Glow.from_pretrained(tmp_path / name)
    assert len(str(caught.value)) < 600
    with pytest.raises(ValueError, match="folder: cannot write"):
        glow().save_pretrained(tmp_path / name / "model")
    long = tmp_path / ("n" * 250)  # as long as a file system allows, nearly
    glow().save_pretrained(long)
    assert Glow.from_pretrained(long).levels == 2


def test_overwrite_replaces_a_model_and_nothing_else(tmp_path, monkeypatch):
    folder, kind, rename = tmp_path / "model", type(tmp_path), type(tmp_path).rename
    glow().save_pretrained(folder)
    with pytest.raises(ValueError, match="overwrite=True replaces the model in it"):
        glow(reversible=False).save_pretrained(folder)

    def fail(path, target):  # the rename of the new model, not that of the old one
        if path.suffix == ".tmp":
            raise OSError("no space")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "rename", fail)
        with pytest.raises(ValueError, match="no space"):
            glow(reversible=False).save_pretrained(folder, overwrite=True)
    assert Glow.from_pretrained(folder).chain.reversible
    glow(reversible=False).save_pretrained(folder, overwrite=True)
    assert not Glow.from_pretrained(folder).chain.reversible
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (folder / "notes").write_text("mine")
    for other in (folder, folder / "notes"):
        with pytest.raises(ValueError, match=r"folder: expected a new folder, but .* exists$"):
            glow().save_pretrained(other, overwrite=True)
    assert (folder / "notes").read_text() == "mine"


def test_the_weights_hold_nothing_but_the_tensors(tmp_path):
    """A tensor that is a view of a large one is written alone."""
    flow = VectorFlow(3, 1, 4)
    flow.chain.layers[0].actnorm.bias.data = torch.randn(1_000_000)[:3]
    flow.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 10_000
    assert len(load_file(tmp_path / "model" / "model.safetensors")) == len(flow.state_dict())
