"""Zips with damaged and hostile members.

A member that cannot be read is skipped and listed with the reason. A zip whose table of contents is
damaged is refused.
"""

import io
import re
import sys
import zipfile

import pytest
from PIL import Image
from tiny_runs import listing, refused

from mflow_kernels.data.prepare import prepare_images
from mflow_kernels.data.sources import find_images
from mflow_kernels.training.cli import main

# From 3.13 on, zipfile compares the lengths of members with their places.
LATER_ZIPFILE = sys.version_info >= (3, 13)


def patch(data, name, local=(), central=()):
    """Overwrite bytes in both headers of a zip's member, given as pairs of offset and bytes."""
    data = bytearray(data)
    for signature, length, edits in ((b"PK\3\4", 30, local), (b"PK\1\2", 46, central)):
        begin = -1
        while True:
            begin = data.index(signature, begin + 1)
            if data[begin + length :].startswith(name):
                break
        for offset, new in edits:
            data[begin + offset : begin + offset + len(new)] = new
    return bytes(data)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    good = io.BytesIO()
    Image.new("L", (8, 8), 128).save(good, "PNG")
    good = good.getvalue()
    path = tmp_path_factory.mktemp("zip") / "all.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("deflate64", "method99", "encrypted", "crc", "offset", "longer", "shorter"):
            file.writestr(f"{name}.png", good)
        file.writestr("lzma.png", good, zipfile.ZIP_LZMA)
        file.writestr("bad-lzma.png", good * 9, zipfile.ZIP_LZMA)
        file.writestr("bad-bzip2.png", good * 9, zipfile.ZIP_BZIP2)
        file.writestr("bad-deflate.png", good * 9, zipfile.ZIP_DEFLATED)
        file.writestr("bomb.png", good + bytes(2**21), zipfile.ZIP_LZMA)
        file.writestr("../outside.png", good)
        file.writestr("/absolute.png", good)
        file.writestr("nameless.png", good)
        file.writestr("folder.png/", "")
        file.writestr("twice.png", Image.new("L", (8, 8)).tobytes())
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("twice.png", good)
        file.writestr("\x1b[2J.png", "no image")
    data = path.read_bytes()
    for name, method in ((b"deflate64", b"\x09"), (b"method99", b"\x63")):
        data = patch(data, name, [(8, method)], [(10, method)])
    data = patch(data, b"encrypted", [(6, b"\1")], [(8, b"\1")])
    data = patch(data, b"nameless", central=[(28, b"\0\0"), (32, b"\x0c\0")])
    data = patch(data, b"crc", central=[(16, b"\0\0\0\0")])
    data = patch(data, b"offset", central=[(42, b"\xf0\xff\xff\x7f")])
    data = patch(data, b"longer", central=[(20, b"\0\0\0\x40"), (24, b"\0\0\0\x40")])
    data = patch(data, b"shorter", central=[(20, b"\x10\0\0\0"), (24, b"\x10\0\0\0")])
    for name in (b"bad-lzma", b"bad-bzip2", b"bad-deflate"):
        data = patch(data, name, [(30 + len(name) + 4 + 9, b"\xff\xff\0\xff\xff")])
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def members(archive, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mflow_kernels.data.sources._LARGEST_MEMBER", 2**20)
        return prepare_images(find_images(archive), tmp_path_factory.mktemp("out") / "a", 8)


SKIPPED = {
    "deflate64": "compression method",
    "method99": "compression method",
    "encrypted": "encrypted, password required",
    "crc": "Bad CRC-32",
    "offset": "Truncated file header",
    "longer": "Overlapped entries" if LATER_ZIPFILE else "EOFError",
    "shorter": "Bad CRC-32",
    "bad-lzma": "Corrupt input data",
    "bad-bzip2": "Invalid data stream",
    "bad-deflate": "while decompressing data",
    "bomb": "inflates to more than 1 MiB",
    "\x1b[2J": "not an image",
}


class TestZip:
    """A zip of every kind of member, prepared once."""

    def test_read(self, members):
        names = ["../outside.png", "/absolute.png", "lzma.png", "twice.png"]
        assert members.record.names == names
        assert (members.images == 128).all()

    def test_skipped_with_the_reason(self, members):
        assert {*members.record.skipped} == {f"{name}.png" for name in SKIPPED}
        for name, reason in SKIPPED.items():
            assert reason in members.record.skipped[f"{name}.png"], name

    def test_no_name_reaches_the_terminal_raw(self, archive, tmp_path, capsys):
        assert main(["prepare", str(archive), "--out", str(tmp_path / "a")]) == 0
        shown = "".join(capsys.readouterr())
        assert "\x1b" not in shown
        assert "\\x1b[2J.png: not an image" in shown
        assert listing(tmp_path) == ["a"]

    def test_a_zip_whose_beginning_is_missing(self, archive, tmp_path):
        """Its table of contents is whole, and the members that are missing are skipped."""
        (tmp_path / "a.zip").write_bytes(archive.read_bytes()[600:])
        prepared = prepare_images(find_images(tmp_path / "a.zip"), tmp_path / "a", 8)
        assert "method99.png" in prepared.record.skipped
        assert "twice.png" in prepared.record.names
        assert (prepared.images == 128).all()

    def test_a_zip_without_a_readable_image(self, tmp_path, capsys):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
            file.writestr("\x1b[31mred.png", "no image")
        message = r"no file there can be read as an image \(\\x1b\[31mred.png: not an image in"
        self.assert_refused(tmp_path, capsys, message)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: data[:-1],
            lambda data: data[:-22] + b"PK\5\6" + b"\xff" * 18,
            lambda data: data.replace(b"PK\1\2\x14\3\x14", b"PK\1\2\x14\3\xff"),  # version 25.5
            lambda data: data.replace(b"PK\1\2", b"PK\0\0"),
            lambda data: b"",
        ],
    )
    def test_a_table_of_contents_that_is_torn_or_lies(self, damage, archive, tmp_path, capsys):
        (tmp_path / "a.zip").write_bytes(damage(archive.read_bytes()))
        message = "data: expected a folder or a complete zip, got"
        self.assert_refused(tmp_path, capsys, message)

    def test_a_zip_without_members(self, tmp_path, capsys):
        (tmp_path / "a.zip").write_bytes(b"PK\5\6" + bytes(18))
        self.assert_refused(tmp_path, capsys, "data: expected images in .*, found none")

    def assert_refused(self, folder, capsys, message):
        command = ["prepare", str(folder / "a.zip"), "--out", str(folder / "a")]
        assert re.search(message, refused(command, folder, capsys))
