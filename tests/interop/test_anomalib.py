"""Models of anomalib are trained and predict by its engine, before and after `accelerate`."""

import copy
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import efficientnet_b5

from mflow_kernels.interop import accelerate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    models = pytest.importorskip("anomalib.models")
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from anomalib.models.image.csflow import torch_model as csflow

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = (64, 64)


@pytest.fixture(autouse=True)
def _random_backbones(monkeypatch):
    """Backbones have random features, because their weights may be out of reach."""
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def untrained(*args, pretrained=False, pretrained_cfg=None, **named):
        return create(*args, pretrained=False, **named)

    monkeypatch.setattr(timm, "create_model", untrained)
    monkeypatch.setattr(csflow, "efficientnet_b5", lambda weights: efficientnet_b5())


def of(name, **options):
    cls = getattr(models, name)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the blocks draw their permutations from this generator
    size = cls.configure_pre_processor(image_size=SIZE)
    model = cls(pre_processor=size, visualizer=False, evaluator=False, **options).double()
    for m in (model.model, getattr(model.model, "encoder", None)):
        if m is not None:
            m.register_forward_pre_hook(in_float64)
    return model


def in_float64(module, args):
    return tuple(x.double() for x in args)


CFLOW = {"layers": ("layer2", "layer3"), "coupling_blocks": 2, "fiber_batch_size": 16}
FLOWS = {  # and the number of scales, each with a run of two blocks
    "Fastflow": ({"flow_steps": 2, "pre_trained": False}, 3),
    "Uflow": ({"flow_steps": 2, "backbone": "resnet18"}, 3),
    "Cflow": ({"backbone": "resnet18", "pre_trained": False, **CFLOW}, 2),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folders of images: bright disks, and disks with a scratch."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64] - 32
    for folder, count in (("good", 6), ("bad", 2)):
        (root / folder).mkdir()
        for i in range(count):
            image = np.where(x**2 + y**2 < 400, 180, 40) + rng.integers(0, 20, (64, 64))
            if folder == "bad":
                image[20:40, 30 + i] = 0
            Image.fromarray(image.astype(np.uint8)).convert("RGB").save(root / folder / f"{i}.png")
    return root


def scores_of(model, images, folder):
    """Train for an epoch in float64, and return the score of each image."""
    torch.manual_seed(1)
    data = Folder(
        "disks",
        "good",
        images,
        "bad",
        train_batch_size=3,
        eval_batch_size=4,
        num_workers=0,
        val_split_mode="same_as_test",
        seed=0,
    )
    engine = Engine(
        max_epochs=1,
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    engine.fit(model, datamodule=data)
    predictions = engine.predict(model, datamodule=data)
    return torch.cat([p.pred_score.flatten() for p in predictions])


@pytest.mark.parametrize("name", FLOWS)
def test_the_engine_finds_the_same_scores(name, images, tmp_path):
    options, scales = FLOWS[name]
    model = of(name, **options)
    fast = copy.deepcopy(model)
    assert [r.layer for r in accelerate(fast).replaced] == ["2 AllInOneBlock"] * scales
    before, after = (scores_of(m, images, tmp_path / str(i)) for i, m in enumerate((model, fast)))
    assert before.std() > 0
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    trained = zip(fast.parameters(), model.parameters(), strict=True)
    assert all(torch.allclose(p, q, rtol=1e-6, atol=1e-9) for p, q in trained)


def test_cs_flow_says_why_it_is_left():
    report = accelerate(of("Csflow", n_coupling_blocks=1))
    assert not report.replaced
    whys = {left.layer: left.why for left in report.left}
    assert whys["ParallelGlowCouplingLayer"].startswith("it changes 3 states at once")
