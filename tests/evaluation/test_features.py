"""Feature networks from local files, and FID and KID."""

import math
import re

import pytest
import torch
from safetensors.torch import save_file
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchvision.models import inception_v3, resnet18

from mflow_kernels.evaluation import features
from mflow_kernels.evaluation.features import (
    SampleQuality,
    _build,
    _pool_as_in_fid,
    feature_distance,
    load_feature_network,
    precision_and_recall,
)
from mflow_kernels.testing import assert_close


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A file with random weights of a classifier with 7 classes."""
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(resnet18(num_classes=7).state_dict(), path)
    return path


def pixels(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


class TestNetwork:
    def test_features_are_the_input_of_the_last_layer(self, resnet):
        network = load_feature_network("resnet18", resnet)
        images = pixels(2, 3, 224, 224)
        found = network(images)
        assert found.shape == (2, 512)
        # Compute them by hand. Images of the network's own size are not resized.
        whole = resnet18(num_classes=7).eval()
        state = torch.nn.Module.state_dict(network.body)
        whole.load_state_dict({**whole.state_dict(), **state})
        with torch.no_grad():
            mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
            deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
            read = []
            whole.fc.register_forward_pre_hook(lambda module, args: read.append(args[0]))
            whole((images / 255 - mean) / deviation)
        assert_close(found, read[0], terms=512 * 9)
        grey = images[:1, :1, :8, :8]  # becomes three equal channels
        assert torch.equal(network(grey), network(grey.expand(-1, 3, -1, -1)))

    def test_inception_pools_as_fid_does(self):
        network = _build("inception").eval()
        block, last = network.Mixed_5b, network.Mixed_7c
        x, y = torch.randn(1, 192, 5, 5), torch.randn(1, 2048, 4, 4)
        with torch.no_grad():
            before = block(x), last(y)
            _pool_as_in_fid(network)
            after = network.Mixed_5b(x), network.Mixed_7c(y)
            # At a corner the average is over four pixels, without the five of padding.
            corner = block.branch_pool(x[:, :, :2, :2].mean((2, 3), keepdim=True))
            highest = last.branch_pool(y[:, :, :2, :2].amax((2, 3), keepdim=True))
        assert_close(after[0][:, -32:, :1, :1], corner, terms=192)
        assert_close(after[1][:, -192:, :1, :1], highest, terms=2048)
        for old, new, own in zip(before, after, (32, 192), strict=True):
            assert torch.equal(old[:, :-own], new[:, :-own])
            assert not torch.equal(old[:, -own:], new[:, -own:])


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file with random weights in the layout of pt_inception-2015-12-05-*.pth."""
    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        how = {"weights": None, "aux_logits": False, "init_weights": False}
        network = inception_v3(num_classes=1008, **how)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0  # statistics of one batch, so that features keep their scale
        with torch.no_grad():
            network.train()(torch.rand(2, 3, 150, 150))
    state = network.state_dict()
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    return path


class TestInception:
    def test_its_features_are_those_of_torchmetrics(self, inception):
        pytest.importorskip("torch_fidelity", reason="needs the extra test-all")
        network = load_feature_network("inception", inception)
        expected = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(inception))
        images = pixels(2, 3, 64, 64)
        assert torch.equal(network(images), expected(images))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("resnet19", "features: expected 'inception' or an image classifier"),
        ("squeezenet1_0", "ends in a linear layer, got 'squeezenet1_0'"),
        ("resnet34", 'in state_dict: "layer1.2.conv1.weight" and '),
    ],
)
def test_weights_of_another_network(name, text, resnet):
    with pytest.raises(ValueError, match=re.escape(text)):
        load_feature_network(name, resnet)


# Contents of a file (none, bytes, or an object for torch.save), and words of the refusal.
BAD_WEIGHTS = [
    (None, "found none at"),
    (b"no weights", "of tensors in .*, but "),
    (resnet18, "holds more than tensors"),  # a function; unpickling it would run code
    ([torch.zeros(1)], "it holds a list"),
    ({"fc.weight": torch.zeros(())}, "in state_dict"),
    ({"fc.weight": torch.zeros(1).expand(2**40, 512)}, "but the file holds fewer numbers"),
    ({"fc.weight": torch.empty(9, 9, device="meta")}, "its 'fc.weight' is not a plain"),
    ({"fc.weight": torch.zeros(9, 9).to_sparse()}, "its 'fc.weight' is not a plain"),
    ({"fc.weight": torch.zeros(9).to(torch.complex64)}, "its 'fc.weight' is not a plain"),
    ({"fc.bias": torch.full((9,), torch.nan)}, "has values that are not finite"),
    ({7: torch.zeros(9)}, "its 7 is not the name"),
    ({"epoch": 3, "state_dict": {}}, "its 'epoch' is of type int"),
]


@pytest.mark.parametrize(("content", "text"), BAD_WEIGHTS, ids=[words for _, words in BAD_WEIGHTS])
def test_files_that_are_torn_or_lie(content, text, tmp_path):
    paths = [tmp_path / "a.pth"]
    if isinstance(content, bytes):
        paths.append(tmp_path / "a.safetensors")
        for path in paths:
            path.write_bytes(content)
    elif content is not None:
        torch.save(content, paths[0])
    for path in paths:
        with pytest.raises(ValueError, match=f"^feature.*{text}"):
            load_feature_network("resnet18", path)


class Same(torch.nn.Identity):
    """Gives torchmetrics features in place of images."""

    num_features = 16


class TestDistance:
    def test_fid_is_that_of_torchmetrics(self):
        real, fake = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))
        fid = FrechetInceptionDistance(feature=Same())
        fid.update(real, real=True)
        fid.update(fake, real=False)
        found = feature_distance(real, fake)
        assert found.fid == pytest.approx(fid.compute().item(), rel=1e-5)

    def test_kid_is_the_unbiased_mmd(self):
        generator = torch.Generator().manual_seed(1)
        real, fake = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64)
        kernel = lambda a, b: (a @ b.T / 4 + 1) ** 3  # noqa: E731
        off = ~torch.eye(9, dtype=torch.bool)
        within = kernel(real, real)[off].mean() + kernel(fake, fake)[off].mean()
        expected = within - 2 * kernel(real, fake).mean()
        found = feature_distance(real, fake)
        assert found.kid == pytest.approx(expected.item(), rel=1e-9)
        # Every subset holds all images, in another order.
        assert found.kid_deviation == pytest.approx(0, abs=1e-9 * abs(expected.item()))

    def test_the_seed_is_left_alone_and_fixed(self, monkeypatch):
        monkeypatch.setattr(features, "KID_SUBSET_SIZE", 50)
        real, fake = torch.randn(2, 60, 2, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(3)
        first, after = feature_distance(real, fake), torch.rand(1)
        torch.manual_seed(3)
        assert torch.equal(torch.rand(1), after)
        assert feature_distance(real, fake) == first
        assert first.kid_deviation > 0
        assert math.isfinite(first.fid)


def by_definition(real, fake):
    """Precision and recall by loops over pairs of images."""

    def share(points, centres):
        balls = []
        for i, centre in enumerate(centres):
            others = sorted(math.dist(centre, c) for j, c in enumerate(centres) if j != i)
            balls.append((centre, others[2]))
        covered = [any(math.dist(p, c) <= radius for c, radius in balls) for p in points]
        return sum(covered) / len(covered)

    real, fake = real.tolist(), fake.tolist()
    return share(fake, real), share(real, fake)


LINE = torch.arange(8.0, dtype=torch.float64)[:, None]
COPIES = torch.full((8, 1), 0.1, dtype=torch.float64)  # balls of radius 0
CLOUD = torch.randn(25, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
# Images, samples, and precision and recall where they are known.
SETS = {
    "few": (CLOUD[:4], CLOUD[4:8] + 0.7, None),
    "more images": (CLOUD, CLOUD[:14].flip(1) + 0.7, None),
    "more samples": (CLOUD[:14], CLOUD.flip(1) + 0.7, None),
    "the same images": (LINE, LINE.flip(0), (1.0, 1.0)),
    "copies of one image": (COPIES, COPIES, (1.0, 1.0)),
    "far apart": (LINE, LINE + 100, (0.0, 0.0)),
    "half of the images": (torch.cat([LINE, LINE + 100]), LINE, (1.0, 0.5)),
    "half of the samples": (LINE, torch.cat([LINE, LINE + 100]), (0.5, 1.0)),
}


class TestPrecisionAndRecall:
    @pytest.mark.parametrize("name", SETS)
    def test_they_follow_the_definition(self, name, monkeypatch):
        monkeypatch.setattr(features, "_DISTANCE_BLOCK", 6)
        real, fake, known = SETS[name]
        found = precision_and_recall(real, fake)
        assert found == by_definition(real, fake)
        if known is not None:
            assert found == known
        distance = feature_distance(real, fake)
        assert (distance.precision, distance.recall) == found
        cells = SampleQuality(0.7, "resnet18", 4, distance, ambient=False).cells()
        assert cells[-2:] == [f"{share:.3f}" for share in found]

    def test_few_images_have_neither(self):
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
        found = feature_distance(x, x[:3])
        assert (found.precision, found.recall) == (None, None)
        with pytest.raises(ValueError, match=r"^real, fake: expected more than 3 .* got 4 and 3$"):
            precision_and_recall(x, x[:3])
