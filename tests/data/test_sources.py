import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_runs import write_images, zip_up

from benchmarks.celeba.fake_celeba import make_celeba
from mflow_kernels.data.decoding import Format, any_in_colour, decode
from mflow_kernels.data.sources import DataError, find_images
from mflow_kernels.data.splits import load_evaluation_set, load_splits


def pixels(data, size=16):
    source = find_images(data)
    channels = 3 if any_in_colour(source.entries) else 1
    form = Format(size, channels, source.crop)
    return np.stack([decode(entry, form)[0] for entry in source.entries])


@pytest.fixture(scope="module")
def celeba(tmp_path_factory):
    return make_celeba(tmp_path_factory.mktemp("data") / "celeba", 20)


@pytest.fixture(scope="module")
def as_zip(tmp_path_factory):
    return make_celeba(tmp_path_factory.mktemp("data") / "zipped", 20, zipped=True)


LAYOUTS = ["a folder", "a folder with the zip", "the zip", "the images' folder", "as downloaded"]
LAYOUTS += ["folders inside folders", "folder twice", "a zip with everything"]


def rearranged(layout, celeba, as_zip, folder):
    """Arrange CelebA in one of LAYOUTS, which people have; return what to give to --data."""
    images, partition = celeba / "img_align_celeba", celeba / "list_eval_partition.txt"
    archive = as_zip / "img_align_celeba.zip"
    if layout == "as downloaded":  # the authors' folders
        for name in ("Img", "Eval"):
            (folder / name).mkdir()
        shutil.copy(archive, folder / "Img")
        shutil.copy(partition, folder / "Eval")
        return folder
    if layout == "folders inside folders":  # torchvision's
        shutil.copytree(celeba, folder / "root" / "celeba")
        return folder
    if layout == "folder twice":  # unpacked where a folder of that name was made before
        shutil.copytree(images, folder / images.name / images.name)
        shutil.copy(partition, folder)
        return folder
    if layout == "a zip with everything":
        return zip_up(celeba, folder / "everything.zip")
    return {
        "a folder": celeba,
        "a folder with the zip": as_zip,
        "the zip": archive,
        "the images' folder": images,
    }[layout]


class TestCelebA:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_all_layouts_hold_the_same(self, layout, celeba, as_zip, tmp_path):
        data = rearranged(layout, celeba, as_zip, tmp_path)
        source = find_images(data)
        assert source.crop == 148
        assert np.bincount(source.parts).tolist() == [16, 2, 2]
        partition = (celeba / "list_eval_partition.txt").read_text().splitlines()
        names = (entry.name.rpartition("/")[2] for entry in source.entries)
        found = zip(names, source.parts, strict=True)
        assert sorted(f"{name} {part}" for name, part in found) == sorted(partition)
        assert np.array_equal(pixels(data), pixels(celeba))

    @pytest.mark.parametrize("path", ["img_align_celeba", "img_align_celeba.zip"])
    def test_no_partition(self, path, celeba, as_zip, tmp_path):
        if path.endswith("zip"):
            shutil.copy(as_zip / path, tmp_path)
        else:
            shutil.copytree(celeba / path, tmp_path / path)
        for data in (tmp_path, tmp_path / path):
            with pytest.raises(DataError, match=f"expected list_eval_partition.txt beside {path}"):
                find_images(data)

    def test_an_image_smaller_than_the_crop(self, celeba, tmp_path):
        folder = shutil.copytree(celeba, tmp_path / "celeba")
        image = folder / "img_align_celeba" / "000003.jpg"
        Image.open(image).resize((120, 147)).save(image)
        with pytest.raises(DataError, match=r"at least 148x148 pixels, got 120x147 in 000003\.jpg"):
            load_splits(str(folder), 16)

    def test_the_crop_and_missing_files(self, celeba, tmp_path):
        folder = shutil.copytree(celeba, tmp_path / "celeba")
        pixels = np.zeros((218, 178, 3), np.uint8)
        pixels[35:183, 15:163] = 255
        first, second = sorted((folder / "img_align_celeba").iterdir())[:2]
        Image.fromarray(pixels).save(first, quality=100)
        second.unlink()
        splits = load_splits(str(folder), 148)
        assert (splits.train.batch([0]) >= 250).all()
        assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [15, 2, 2]
        assert splits.skipped == (second.name,)
        assert len(load_evaluation_set(str(folder), 148).images) == 2  # the test part

    def test_an_empty_part(self, celeba, tmp_path):
        folder = shutil.copytree(celeba, tmp_path / "celeba")
        partition = folder / "list_eval_partition.txt"
        partition.write_text(partition.read_text().replace(" 1\n", " 0\n"))
        with pytest.raises(ValueError, match="found no valid images"):
            load_splits(str(folder), 16)


class TestZip:
    def test_the_same_images_as_the_folder(self, tmp_path):
        write_images(tmp_path / "faces" / "b", 5, (30, 20), channels=3)
        write_images(tmp_path / "faces" / "a", 4, (9, 12), channels=3, seed=1)
        archive = zip_up(tmp_path / "faces", tmp_path / "faces.zip")
        assert np.array_equal(pixels(archive), pixels(tmp_path / "faces"))
        names = [entry.name for entry in find_images(archive).entries]
        assert names == [entry.name for entry in find_images(tmp_path / "faces").entries]
        assert names == sorted(names)  # not the order of the disk
        (tmp_path / "inside").mkdir()
        shutil.move(archive, tmp_path / "inside")
        assert np.array_equal(pixels(tmp_path / "inside"), pixels(tmp_path / "faces"))

    def test_hidden_files_and_those_of_macos_are_left_out(self, tmp_path):
        write_images(tmp_path / "f" / "real", 2)
        write_images(tmp_path / "f" / "__MACOSX", 2)
        write_images(tmp_path / "f" / ".thumbnails", 2)
        (tmp_path / "f" / "real" / ".DS_Store").write_text("x")
        archive = zip_up(tmp_path / "f", tmp_path / "f.zip")
        names = [entry.name for entry in find_images(archive).entries]
        assert names == ["real/000.png", "real/001.png"]

    def test_a_zip_that_is_gone_is_one_error(self, tmp_path):
        write_images(tmp_path / "f", 3)
        archive = zip_up(tmp_path / "f", tmp_path / "f.zip")
        source = find_images(archive)
        archive.unlink()
        with pytest.raises(DataError, match="a folder or a complete zip"):
            decode(source.entries[0], Format(8, 1))
