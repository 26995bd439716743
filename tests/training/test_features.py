"""Feature networks from local files, and the distances that they give."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18

from mflow_kernels.testing import assert_close
from mflow_kernels.training.features import (
    FeatureNetwork,
    _build,
    _pool_as_in_fid,
    feature_distance,
    load_feature_network,
)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A file of random weights of a classifier of 7 classes."""
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(resnet18(num_classes=7).state_dict(), path)
    return path


def pixels(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


class TestNetwork:
    def test_features_are_what_the_last_layer_reads(self, resnet):
        network = load_feature_network("resnet18", resnet)
        images = pixels(2, 3, 224, 224)
        features = network(images)
        assert features.shape == (2, 512)
        # By hand: at the network's own size nothing is resized.
        whole = resnet18(num_classes=7).eval()
        state = torch.nn.Module.state_dict(network.body)
        whole.load_state_dict({**whole.state_dict(), **state})
        with torch.no_grad():
            mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
            deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
            read = []
            whole.fc.register_forward_pre_hook(lambda module, args: read.append(args[0]))
            whole((images / 255 - mean) / deviation)
        assert_close(features, read[0], terms=512 * 9)

    def test_grey_images_are_those_of_three_equal_channels(self, resnet):
        network = load_feature_network("resnet18", resnet)
        grey = pixels(1, 1, 8, 8)
        assert torch.equal(network(grey), network(grey.expand(-1, 3, -1, -1)))

    def test_inception_pools_as_fid_does(self):
        network = _build("inception", 3).eval()
        block, last = network.Mixed_5b, network.Mixed_7c
        x, y = torch.randn(1, 192, 5, 5), torch.randn(1, 2048, 4, 4)
        with torch.no_grad():
            before = block(x), last(y)
            _pool_as_in_fid(network)
            after = network.Mixed_5b(x), network.Mixed_7c(y)
            # A corner's average is of the four pixels that are there, not of nine.
            corner = block.branch_pool(x[:, :, :2, :2].mean((2, 3), keepdim=True))
            highest = last.branch_pool(y[:, :, :2, :2].amax((2, 3), keepdim=True))
        assert_close(after[0][:, -32:, :1, :1], corner, terms=192)
        assert_close(after[1][:, -192:, :1, :1], highest, terms=2048)
        for old, new, own in zip(before, after, (32, 192), strict=True):
            assert torch.equal(old[:, :-own], new[:, :-own])
            assert not torch.equal(old[:, -own:], new[:, -own:])

    def test_images_are_scaled_as_told(self):
        scale, shift = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 2.0])
        network = FeatureNetwork(torch.nn.Identity(), 1, scale, shift)
        assert network(pixels(1, 1, 1, 1).fill_(10)).tolist() == [[10.0, 21.0, 32.0]]


class TestBadWeights:
    def told(self, name, path, text):
        with pytest.raises(ValueError, match=r"^feature") as raised:
            load_feature_network(name, path)
        assert text in str(raised.value)

    def test_missing(self, tmp_path):
        self.told("inception", tmp_path / "none.pth", "found none at")

    def test_unknown_network(self, resnet):
        self.told("resnet19", resnet, "features: expected 'inception' or an image classifier")

    def test_network_without_a_last_linear_layer(self, resnet):
        self.told("squeezenet1_0", resnet, "ends in a linear layer, got 'squeezenet1_0'")

    def test_of_another_network(self, resnet):
        self.told("resnet34", resnet, "expected a state dict of 'resnet34'")

    def test_torn(self, tmp_path):
        for name in ("a.pth", "a.safetensors"):
            (tmp_path / name).write_bytes(b"no weights")
            self.told("resnet18", tmp_path / name, "could not read it")

    def test_code_is_not_run(self, tmp_path):
        torch.save(resnet18, tmp_path / "a.pth")  # a function, not tensors
        self.told("resnet18", tmp_path / "a.pth", "could not read it")
        torch.save([torch.zeros(1)], tmp_path / "b.pth")
        self.told("resnet18", tmp_path / "b.pth", "it holds a list")


class TestDistance:
    def test_fid_is_that_of_the_gaussians(self):
        generator = torch.Generator().manual_seed(0)
        real = torch.randn(50, 3, generator=generator, dtype=torch.float64)
        # The covariance becomes 9 S: tr(S + 9 S - 2 * 3 S) = 4 tr S.
        fake = 3 * real + torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
        shift = (fake.mean(0) - real.mean(0)).square().sum()
        expected = shift + 4 * real.var(0).sum()
        assert feature_distance(real, fake).fid == pytest.approx(expected.item(), rel=1e-9)

    def test_kid_is_the_unbiased_mmd(self):
        real, fake = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(1))
        kernel = lambda a, b: (a @ b.T / 4 + 1) ** 3  # noqa: E731
        off = ~torch.eye(9, dtype=torch.bool)
        within = kernel(real, real)[off].mean() + kernel(fake, fake)[off].mean()
        expected = within - 2 * kernel(real, fake).mean()
        found = feature_distance(real, fake)
        assert found.kid == pytest.approx(expected.item(), rel=1e-4)  # float32, subsets are all
        assert found.kid_deviation == pytest.approx(0, abs=1e-5 * abs(expected.item()) + 1e-6)

    def test_the_seed_is_left_alone_and_fixed(self):
        real, fake = torch.randn(2, 1100, 2, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(3)
        first, after = feature_distance(real, fake), torch.rand(1)
        torch.manual_seed(3)
        assert torch.equal(torch.rand(1), after)
        assert feature_distance(real, fake) == first
        assert first.kid_deviation > 0
        assert math.isfinite(first.fid)
