"""Image files of every kind: those that are read, and those that are skipped with the reason."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from mflow_kernels.data.decoding import any_in_colour
from mflow_kernels.data.prepare import prepare_images
from mflow_kernels.data.sources import find_images


def tiff(folder, name, pixels, **tags):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[getattr(TiffImagePlugin, tag)] = value
    Image.fromarray(pixels).save(folder / name, "TIFF", tiffinfo=info)


def twelve_bit_tiff(value):
    """A grey 8x8 TIFF of 12 bits a pixel, which Pillow can read but not write."""
    packed = struct.pack(">I", value << 20 | value << 8)[:3] * 32
    tags = {256: 8, 257: 8, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: len(packed)}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in tags.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(packed))
    return head + packed + struct.pack("<H", len(tags)) + fields + bytes(4)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    full = np.full((8, 8), 1, np.uint16)
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for kind in KINDS:
        Image.new("L", (8, 8), 128).save(folder / f"good.{kind}")
    Image.fromarray(full * 0x8081).save(folder / "sixteen.png")
    Image.fromarray(full * 0x8081).save(folder / "sixteen.tif")
    (folder / "sixteen.pgm").write_bytes(b"P5 8 8 65535\n" + b"\x80\x81" * 64)
    (folder / "ten.pgm").write_bytes(b"P5 8 8 1023\n" + b"\x02\x00" * 64)
    (folder / "twelve.tif").write_bytes(twelve_bit_tiff(0x808))
    tiff(folder, "inverted.tif", full * 0x8081, PHOTOMETRIC_INTERPRETATION=0)
    lying = (full * 0x0400).tobytes()  # a second page is never read
    stack = io.BytesIO()
    Image.new("L", (8, 8), 128).save(
        stack, "TIFF", save_all=True, append_images=[Image.frombytes("I;16", (8, 8), lying)]
    )
    (folder / "pages.tif").write_bytes(stack.getvalue())
    Image.fromarray(values).save(folder / "float.tif")
    Image.fromarray((values * 1000).astype(np.int32)).save(folder / "int32.tif")
    (folder / "float.pfm").write_bytes(b"Pf\n8 8\n-1.0\n" + values.tobytes())
    Image.new("L", (8, 8), 128).save(folder / "script.eps")
    Image.new("L", (8, 8), 128).save(folder / "other.tga")
    (folder / "torn.png").write_bytes((folder / "good.png").read_bytes()[:-30])
    (folder / "empty.png").touch()
    good = (folder / "good.png").read_bytes()
    wide = b"IHDR" + struct.pack(">II", 30_000, 30_000) + good[24:29]
    check = struct.pack(">I", zlib.crc32(wide))
    (folder / "huge.png").write_bytes(good[:12] + wide + check + good[33:])
    os.mkfifo(folder / "fifo.png")
    (folder / "dangling.png").symlink_to("nowhere")
    (folder / "folder.png").mkdir()
    (folder / "circle").symlink_to(".")
    return prepare_images(find_images(folder), tmp_path_factory.mktemp("out") / "a", 8)


KINDS = ("png", "jpg", "webp", "bmp", "gif", "tiff", "ppm", "pgm")
READ = dict.fromkeys((f"good.{kind}" for kind in KINDS), 128)
READ |= dict.fromkeys(("sixteen.png", "sixteen.tif", "sixteen.pgm", "ten.pgm", "twelve.tif"), 0x80)
READ |= {"inverted.tif": 0x7F, "pages.tif": 128}
SKIPPED = {
    **dict.fromkeys(("float.tif", "float.pfm", "int32.tif"), "no standard defines white"),
    "script.eps": "not an image in one of the formats PNG, JPEG, WEBP",
    "other.tga": "not an image in one of the formats",
    "torn.png": "truncated",
    "empty.png": "not an image in one of the formats",
    "huge.png": "decompression bomb",
}


class TestImages:
    """A folder of every kind, prepared once."""

    def test_read(self, kinds):
        assert kinds.record.names == sorted(READ)
        for name, image in zip(kinds.record.names, kinds.images, strict=True):
            assert (image == READ[name]).all(), name

    def test_skipped_with_the_reason(self, kinds):
        assert kinds.record.skipped.keys() == SKIPPED.keys()
        for name, reason in SKIPPED.items():
            assert reason in kinds.record.skipped[name], name

    @pytest.mark.parametrize(
        "name", ["float.tif", "float.pfm", "int32.tif", "sixteen.tif", "sixteen.png"]
    )
    def test_grey_of_any_depth_is_no_colour(self, name, kinds):
        folder = Path(kinds.record.source)
        assert not any_in_colour([e for e in find_images(folder).entries if e.name == name])
