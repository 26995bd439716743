import numpy as np
import pytest
import torch
from PIL import Image

from mflow_kernels.evaluation.pictures import draw_histograms, draw_images, draw_spectrum, in_rows
from mflow_kernels.models.selection import IntrinsicDimension

pytestmark = pytest.mark.pictures


def test_images_are_drawn_at_whole_pixels(tmp_path):
    # Red and blue tiles of 16 pixels, enlarged 4 times with no blur between them.
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(4, 3, 16, 16)
    blue = red.flip(1)
    draw_images(tmp_path / "a.png", "Two rows", {"red": red, "blue": blue})
    with Image.open(tmp_path / "a.png") as image:
        colours = dict((colour, count) for count, colour in image.convert("RGB").getcolors(1 << 16))
    assert colours[255, 0, 0] == colours[0, 0, 255] == 4 * 64 * 64


@pytest.mark.parametrize("count", [1, 6])
def test_no_text_is_cut(tmp_path, count):
    images = torch.full((count, 1, 8, 8), 255, dtype=torch.uint8)
    wide = "W" * 15  # 80 letters W are wider than any text
    text = "Manifold Samples Before and After the Hierarchical Stages at a Temperature, 0.85"
    draw_images(tmp_path / "a.png", text, {wide: images, text: images}, footer=text)
    with Image.open(tmp_path / "a.png") as image:
        grey = torch.tensor(np.array(image.convert("L")))
    assert len(text) == 80
    assert (grey[:, :8] == 255).all()
    assert (grey[:, -8:] == 255).all()
    assert (grey < 128).any()


def test_long_rows_are_broken_and_the_last_is_filled():
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1)
    # The names differ in a space only.
    rows = in_rows({"a": images, "a ": images + 10}, columns=3)
    assert [(name, row.flatten().tolist()) for name, row in rows] == [
        ("a", [0, 1, 2]), ("a ", [10, 11, 12]), ("a", [3, 4, 255]), ("a ", [13, 14, 255]),
    ]  # fmt: skip


@pytest.mark.parametrize("dimension", [2, 5])
def test_a_spectrum_is_drawn(tmp_path, dimension):
    spectrum = torch.tensor([2.0, 1.0, 0.02, 0.01, 0.01], dtype=torch.float64)
    draw_spectrum(tmp_path / "a.png", IntrinsicDimension(dimension, 50.0, spectrum))
    with Image.open(tmp_path / "a.png") as image:
        colours = {colour[:3] for _, colour in image.getcolors(1 << 20)}
    # Values on the manifold are blue, values off it orange.
    assert (31, 119, 180) in colours
    assert ((255, 127, 14) in colours) == (dimension == 2)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1.0, 2.0], [2.0, 3.0]),
        ([1.0, 2.0], [1e6, torch.inf]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([1e6, 1e6], [1e6, 1e6]),
        ([torch.nan], [-torch.inf]),
    ],
)
def test_histograms_are_drawn_of_any_values(tmp_path, first, second):
    sets = {"a": torch.tensor(first).double(), "b": torch.tensor(second).double()}
    draw_histograms(tmp_path / "a.png", {"left": sets, "right": sets})
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 840
        blue_seen = (142, 186, 217) in {c[:3] for _, c in image.getcolors(1 << 20)}  # half of C0
    assert blue_seen
