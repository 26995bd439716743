"""Preprocessing of images, which is exactly that of training, and bits per dimension."""

import warnings

import numpy as np
import pytest
import torch
from cases import normal, perturbed
from PIL import Image

from mflow_kernels import (
    FlowStep,
    Glow,
    HierarchicalFlow,
    ManifoldFlow,
    ReversibleChain,
    Squeeze,
    VectorFlow,
    bits_per_dimension,
)
from mflow_kernels.data.decoding import Format, decode
from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.sources import find_images


def model(channels=3, n_bits=5, crop=None) -> HierarchicalFlow:
    flow = perturbed(HierarchicalFlow([ManifoldFlow(Glow((channels, 8, 8), 1, 1, 4), 5)])).eval()
    flow.n_bits, flow.crop = n_bits, crop
    return flow


def photo(seed, size=(20, 14), mode="RGB"):
    shape = (*reversed(size), 3) if mode == "RGB" else tuple(reversed(size))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels)


# Formats of files that have no such mode.
UNKNOWN = {("jpg", "I;16"), ("jpg", "P"), ("jpg", "LA"), ("png", "CMYK")}


@pytest.mark.parametrize("crop", [None, 10])
@pytest.mark.parametrize("channels", [1, 3])
def test_files_are_decoded_as_in_training(channels, crop, tmp_path):
    """The pixels equal those of prepared files, and the noise is the same. EXIF turns an image.
    Pillow mixes up the pixels of TIFFs that it opens by their paths."""
    rotated, grey = Image.Exif(), photo(1, mode="L")
    rotated[0x0112] = 6
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    images = [grey, deep, *(photo(1).convert(mode) for mode in ("RGB", "P", "1", "LA", "CMYK"))]
    for form in ("jpg", "png", "tiff"):
        for number, image in enumerate(images):
            if (form, image.mode) not in UNKNOWN:
                image.save(tmp_path / f"{number}.{form}", exif=rotated)
    entries, pixels = find_images(tmp_path).entries, Format(8, channels, crop)
    stored = np.stack([decode(entry, pixels)[0] for entry in entries])
    opened = [Image.open(path) for path in sorted(tmp_path.iterdir())]
    assert len(stored) == len(opened) == 17
    flow = model(channels, crop=crop)
    x = flow.preprocess(opened, noise=True, generator=torch.Generator().manual_seed(3))
    expected = dequantize(torch.from_numpy(stored), 5, torch.Generator().manual_seed(3))
    assert torch.equal(x, expected)
    levels = torch.from_numpy(stored // 8).float()
    centres = (levels + 0.5) / 32 - 0.5
    assert torch.equal(flow.preprocess(opened), centres)
    assert all(image.filename for image in opened)  # as they were
    turned = flow.preprocess(Image.fromarray(np.rot90(np.asarray(grey), -1)))[0]
    for x, image in zip(centres, opened, strict=True):
        if image.mode in ("L", "I;16") and not image.filename.endswith("jpg"):
            assert torch.equal(x, turned)


def test_arrays_and_single_images():
    flow, image = model(), photo(0)
    x = flow.preprocess(image)
    assert x.shape == (1, 3, 8, 8)
    assert torch.equal(flow.preprocess(np.asarray(image)), x)
    assert torch.equal(flow.preprocess([image, np.asarray(image)]), torch.cat([x, x]))
    grey = photo(1, mode="L")
    assert torch.equal(flow.preprocess(np.asarray(grey)[..., None]), flow.preprocess(grey))
    double = model().double()
    assert double.preprocess(image).dtype == torch.float64


MODELS = {
    "glow": lambda: Glow((3, 8, 8), 1, 1, 4),
    "chain": lambda: ReversibleChain([Squeeze(), FlowStep(12, width=4)], input_shape=(3, 8, 8)),
    "manifold of a chain": lambda: ManifoldFlow(MODELS["chain"](), 5),
    "hierarchy": model,
    "grey hierarchy": lambda: model(1),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_images(name):
    flow, images = perturbed(MODELS[name]()).eval(), [photo(0), photo(1)]
    flow.n_bits = 5
    x = flow.preprocess(images, noise=True, generator=torch.Generator().manual_seed(1))
    bits = flow.bits_per_dim(images, generator=torch.Generator().manual_seed(1))
    assert torch.equal(bits, bits_per_dimension(flow.log_prob(x), x[0].numel(), 5))
    assert not bits.requires_grad
    back = flow.postprocess(flow.preprocess(images))
    mode = "RGB" if len(x[0]) == 3 else "L"
    assert [(image.mode, image.size) for image in back] == [(mode, (8, 8))] * 2
    assert torch.equal(flow.preprocess(back), flow.preprocess(images))


def test_grey_images_and_values_outside_the_range():
    (image,) = model(1).postprocess(torch.full((1, 1, 8, 8), 7.0))
    assert (image.mode, image.getextrema()) == ("L", (255, 255))
    with pytest.raises(ValueError, match=r"x: expected shape \(N, 1, 8, 8\), got \(1, 3, 8, 8\)"):
        model(1).postprocess(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    "flow", [VectorFlow(3, 1), ReversibleChain([FlowStep(4)])], ids=["vectors", "no shape"]
)
def test_models_of_no_images(flow):
    flow.n_bits = 8
    for call in (flow.preprocess, flow.postprocess, flow.bits_per_dim):
        with pytest.raises(ValueError, match=r"input_shape: expected a model of images"):
            call(torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 8, 8), TypeError, "images: expected an image, a uint8 array or a list"),
        ([], TypeError, "images: expected an image, a uint8 array or a list"),
        (np.zeros((8, 8)), TypeError, r"images: expected a uint8 array .* got float64 \(8, 8\)"),
        (np.zeros((2, 8, 8), np.uint8), TypeError, r"images: expected a uint8 array .*\(2, 8, 8\)"),
        ([photo(0), "a.png"], TypeError, r"images\[1\]: expected a Pillow image .*, got str"),
        (photo(0, (9, 30)), ValueError, "images: expected at least 10x10 pixels.* got 9x30"),
        (np.zeros(30, np.uint8), TypeError, r"images: expected a uint8 array .*\(30,\)"),
        (np.zeros((0, 12), np.uint8), TypeError, r"images: expected a uint8 array .*\(0, 12\)"),
        (np.zeros((12, 12, 0), np.uint8), TypeError, r"images: expected a .*\(12, 12, 0\)"),
        (np.uint8(3) * np.ones((), np.uint8), TypeError, r"images: expected a|images: expected an"),
        (Image.new("L", (0, 12)), ValueError, "images: expected pixels, got an image of 0x12"),
        ([Image.new("I", (12, 12), 200)], ValueError, r"images\[0\]: no standard defines white"),
        (Image.new("F", (12, 12), 0.5), ValueError, "images: no standard defines white"),
    ],
)
def test_bad_images(images, error, message):
    with pytest.raises(error, match=message):
        model(crop=10).preprocess(images)


def test_a_model_that_does_not_know_its_bits():
    with pytest.raises(ValueError, match=r"n_bits: expected a number from 1 to 8, got None"):
        model(n_bits=None).preprocess(photo(0))


WARNING = r"x: expected images of a range of about 1, .* got values up to 255: .*x / 256 - 0.5"


@pytest.mark.parametrize("method", ["initialize", "encode", "project", "log_prob"])
def test_images_from_0_to_255_draw_a_warning_once(method):
    flow = model().stages[0]
    raw = torch.from_numpy(np.asarray(photo(0, (8, 8))).transpose(2, 0, 1).copy())[None].float()
    raw[0, 0, 0, 0] = 255
    with pytest.warns(UserWarning, match=WARNING) as seen:
        getattr(flow, method)(raw)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(flow, method)(raw)  # once
        fresh = model().stages[0]
        getattr(fresh, method)(raw / 256 - 0.5)
        getattr(fresh, method)(3 * normal(2, 3, 8, 8))


def test_a_flow_warns_too():
    raw = 255 * torch.rand(2, 3, 8, 8)
    with pytest.warns(UserWarning, match="expected images of a range of about 1"):
        Glow((3, 8, 8), 1, 1, 4).log_prob(raw)
