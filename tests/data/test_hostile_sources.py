"""Damaged partitions of CelebA, folders that cannot be listed, and file names that are not text."""

import os
import re

import pytest
from tiny_runs import refused, write_images

from mflow_kernels.data.prepared import open_prepared
from mflow_kernels.data.sources import find_images
from mflow_kernels.training.cli import main

PARTITION = "000.png 0\n001.png 1\n002.png 2\n"
PARTITIONS = {
    "contradictory lines": (PARTITION + "000.png 2\n", "line 4: expected 000.png in one part, got"),
    "a part of 3": (PARTITION + "003.png 3\n", "line 4: expected a file name and 0, 1 or 2"),
    "three words": (PARTITION + "003.png 0 1\n", "line 4: expected a file name"),
    "escapes": ("\x1b[2J\n", r"line 1: expected a file name and 0, 1 or 2, got '\\x1b\[2J'"),
    "no text": (b"\xff\xfe\0\0", "cannot read"),
    "nothing": ("\n\n", "expected file names and their parts"),
    "torn": (PARTITION + "003.p", "line 4: expected a file name"),
    "names that are not there": ("a.png 0\nb.png 1\nc.png 2\n", "found none"),
}


class TestPartition:
    @pytest.fixture
    def celeba(self, tmp_path):
        write_images(tmp_path / "celeba" / "img_align_celeba", 4, (178, 218), channels=3)
        return tmp_path / "celeba"

    @pytest.mark.parametrize("case", PARTITIONS)
    def test_it_is_refused(self, case, celeba, tmp_path, capsys):
        text, message = PARTITIONS[case]
        path = celeba / "list_eval_partition.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        named = "" if "not there" in case else f"(?=.*{re.escape(str(path))})"
        command = ["prepare", str(celeba), "--out", str(tmp_path / "a")]
        assert re.search(f"{named}.*{message}", refused(command, tmp_path, capsys))

    def test_the_same_line_twice_and_a_mark_of_byte_order(self, celeba):
        text = PARTITION + PARTITION.replace("\n", "\r\n")
        (celeba / "list_eval_partition.txt").write_text(text, "utf-8-sig")
        assert find_images(celeba).parts == [0, 1, 2]

    def test_two_files_of_a_listed_name(self, celeba, tmp_path, capsys):
        (celeba / "list_eval_partition.txt").write_text(PARTITION)
        write_images(celeba / "img_align_celeba" / "more", 1, (178, 218), channels=3, seed=1)
        message = "expected one file 000.png in .*, found 000.png and more/000.png"
        command = ["prepare", str(celeba), "--out", str(tmp_path / "a")]
        assert re.search(message, refused(command, tmp_path, capsys))


class TestFolders:
    def test_one_that_cannot_be_listed_is_an_error(self, tmp_path, monkeypatch, capsys):
        """The listing is simulated, because tests may run as root, who may list every folder."""
        write_images(tmp_path / "f", 2)
        closed = tmp_path / "f" / "closed"
        closed.mkdir()
        scandir = os.scandir

        def refusing(path):
            if os.fspath(path) == str(closed):
                raise PermissionError(13, "Permission denied", str(closed))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refusing)
        command = ["prepare", str(tmp_path / "f"), "--out", str(tmp_path / "a")]
        assert re.search(f"{closed}.*Permission denied", refused(command, tmp_path, capsys))

    def test_names_that_are_too_long_or_no_text(self, images, tmp_path, capsys):
        for out, message in (
            ("x" * 300, "File name too long"),
            ("x" * 250, ".journal: File name too long"),
            ("a" + os.fsdecode(b"\xff") + "/b", "--out: expected a folder that can be written"),
        ):
            command = ["prepare", str(images), "--out", str(tmp_path / out)]
            assert message in refused(command, tmp_path, capsys)

    def test_bytes_that_are_no_utf_8(self, tmp_path, capsys):
        folder = tmp_path / os.fsdecode(b"\xff\xfe")
        write_images(folder, 3)
        (folder / "000.png").rename(folder / os.fsdecode(b"\x80.png"))
        (folder / os.fsdecode(b"\x81.png")).write_text("no image")
        out = tmp_path / os.fsdecode(b"\xff.safetensors")
        assert main(["prepare", str(folder), "--out", str(out)]) == 0
        assert "\\udc81.png: not an image" in capsys.readouterr().out
        assert os.fsdecode(b"\x80.png") in open_prepared(out).record.names
