"""The list of images that a run records, and how the data set differs from it later."""

import os
import re

import numpy as np
import pytest
import torch
from tiny_runs import write_images

from mflow_kernels.data.manifest import Manifest
from mflow_kernels.data.splits import DataError, load_splits


def manifest(*rows):
    """Make a manifest from rows of name, part and digest, such as "a.png 0 1f"."""
    names, parts, digests = zip(*(row.split() for row in rows), strict=True)
    return Manifest(names, np.array(parts, np.uint8), [digest.zfill(16) for digest in digests])


THEN = manifest("a 0 1", "b 2 2", "c 0 3", "d 2 4")


class TestDifference:
    @pytest.mark.parametrize(
        ("now", "message"),
        [
            (THEN, None),
            (manifest("a 0 1", "b 2 2", "c 0 3", "d 2 4", "e 0 5"), "1 image added (e)"),
            (manifest("b 2 2", "d 2 4"), "2 images missing (a, c)"),
            (manifest("a 0 9", "b 2 2", "c 0 3", "d 2 4"), "1 image changed (a)"),
            (manifest("b 2 2", "a 0 1", "c 0 3", "d 2 4"), "the order of the images"),
            (
                manifest("a 2 1", "b 0 2", "c 0 3", "x\x1b[2J 0 4"),
                "1 image added (x\\x1b[2J), 1 missing (d), 2 in another part (a, b)",
            ),
            (
                manifest(*(f"{name} 0 1" for name in "vwxyz")),
                "5 images added (v, w, x, ...), 4 missing (a, b, c, ...)",
            ),
        ],
    )
    def test_in_words(self, now, message):
        assert now.difference(THEN) == message


class TestHeldOut:
    def test_by_name(self):
        now = manifest("a 2 1", "b 0 2", "c 2 3", "d 2 4", "e 2 5")
        assert now.held_out_by(THEN).tolist() == [1, 3]

    def test_a_name_swapped_with_a_training_image_is_left_out(self):
        now = manifest("a 0 2", "b 2 1", "c 0 3", "d 2 8")
        assert now.held_out_by(THEN).tolist() == [3]

    def test_a_duplicate_of_a_training_image_stays_as_it_was_then(self):
        then = manifest("a 0 1", "b 2 1")
        assert then.held_out_by(then).tolist() == [1]

    def test_trained_on_under_any_name(self):
        assert manifest("x 0 3", "y 2 1", "z 0 2").trained_on(THEN).tolist() == [True, True, False]


class TestFile:
    def test_round_trip(self, tmp_path):
        names = ["a,b.png", 'say "x".png', "two\nlines\r\n.png", os.fsdecode(b"\xff\x80.png"), "é"]
        before = Manifest(names, np.array([0, 1, 2, 0, 0], np.uint8), ["0123456789abcdef"] * 5)
        before.write(tmp_path / "images.csv")
        after = Manifest.read(tmp_path / "images.csv")
        assert after.difference(before) is None
        assert list(after.names) == names
        assert after.parts.tolist() == [0, 1, 2, 0, 0]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "expected the list of a run's images"),
            ("name,part,digest\n", "expected at least one image"),
            ("name,part,digest\na,0,0123456789abcdef\nb,2,01234", "row 3: expected a name, a part"),
            ("name,part,digest\na,3,0123456789abcdef\n", "row 2: expected a name, a part"),
            ('name,part,digest\n"a,0,0123456789abcdef\n', "expected the list of a run's images"),
            ("name,part,digest\n" + 2 * "a,0,0123456789abcdef\n", "different names"),
            ("x" * 200_000, "expected the list of a run's images"),
        ],
    )
    def test_a_damaged_or_foreign_file(self, text, message, tmp_path):
        path = tmp_path / "images.csv"
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            Manifest.read(path)
        assert message in str(caught.value)
        path.unlink()
        for unreadable in (path, tmp_path):  # no file, and a folder
            with pytest.raises(ValueError, match=re.escape(str(unreadable))):
                Manifest.read(unreadable)


class TestData:
    def test_a_copy_or_a_zip_has_the_same_images(self, tmp_path):
        write_images(tmp_path / "f", 5)
        before = load_splits(str(tmp_path / "f"), 8).manifest
        for path in (tmp_path / "f").iterdir():
            os.utime(path, (1, 1))
        assert load_splits(str(tmp_path / "f"), 8).manifest.difference(before) is None

    def test_a_file_added_does_not_change_the_images_trained_on(self, tmp_path):
        write_images(tmp_path / "f", 30)
        before = load_splits(str(tmp_path / "f"), 8)
        assert torch.equal(
            before.trained_on_by(before.manifest).batch(range(27)), before.train.batch(range(27))
        )
        first = str(before.manifest.names[np.flatnonzero(before.manifest.parts == 0)[0]])
        other = write_images(tmp_path / "more", 1, seed=1) / "000.png"
        other.rename(tmp_path / "f" / "aaa.png")
        (tmp_path / "f" / first).write_bytes((tmp_path / "f" / "aaa.png").read_bytes())
        now = load_splits(str(tmp_path / "f"), 8)
        found = now.trained_on_by(before.manifest)  # not `first`, which has other pixels now
        assert torch.equal(found.batch(range(26)), before.train.batch(range(1, 27)))
        assert len(found) == 26

    def test_no_recorded_image_is_left(self, tmp_path):
        splits = load_splits(str(write_images(tmp_path / "f", 5)), 8)
        then = manifest("x 0 1", "y 2 2", "z 2 3")
        with pytest.raises(DataError, match="the 2 images that the run held out, found none"):
            splits.held_out_by(then)
        with pytest.raises(DataError, match="the 1 images that the run was trained on, found none"):
            splits.trained_on_by(then)
