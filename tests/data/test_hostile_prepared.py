"""Damaged prepared files, and links in their place: refused in one line with exit code 2."""

import json
import re
import struct

import pytest
from tiny_runs import TINY, refused

from mflow_kernels.data.prepare import prepare_images
from mflow_kernels.data.prepared import HEADER_BYTES
from mflow_kernels.data.sources import find_images
from mflow_kernels.training.cli import main

COUNT = 12
PIXELS = COUNT * 8 * 8


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The bytes of a prepared file of `images`, which are 8x8."""
    path = tmp_path_factory.mktemp("whole") / "a"
    prepare_images(find_images(images), path, 8)
    return path.read_bytes()


def header(*keys, value):
    """Set one entry of a prepared file's header and nothing else."""

    def damage(data):
        entries = json.loads(data[8:HEADER_BYTES])
        set_at(entries, keys, value)
        text = json.dumps(entries).encode().ljust(HEADER_BYTES - 8)
        return struct.pack("<Q", len(text)) + text + data[HEADER_BYTES:]

    return damage


def set_at(entries, keys, value):
    for key in keys[:-1]:
        entries = entries[key]
    entries[keys[-1]] = value


HEADER = "its header is not one that mflow prepare writes"
SHAPES = "its header lists the shapes"
LENGTH = "its length does not agree with its header"
# One damage for each check, and the words that refuse it.
PREPARED = {
    "floats": (header("images", "dtype", value="F32"), HEADER),
    "an offset before the images": (header("images", "data_offsets", value=[-9, 759]), HEADER),
    "a negative shape": (header("images", "shape", value=[-12, 1, 8, 8]), SHAPES),
    "true for 1": (header("images", "shape", value=[COUNT, True, 8, 8]), SHAPES),
    "a huge shape": (header("images", "shape", value=[2**62, 1, 2**40, 2**40]), HEADER),
    "other axes": (header("images", "shape", value=[COUNT, 64]), "damaged"),
    "no shape": (header("record", value={}), "damaged"),
    "a deep header": (lambda data: data[:80] + b"[" * 4016 + data[HEADER_BYTES:], "damaged"),
    "a header's length that lies": (lambda data: b"\xff" * 8 + data[8:], HEADER),
    "one byte less": (lambda data: data[:-1], LENGTH),
    "one byte more": (lambda data: data + b" ", LENGTH),
    "half a header": (lambda data: data[:200], "damaged"),
    "a digit of the record": (
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        "its record does not match its checksum",
    ),
    "a part of 7": (
        lambda data: data[: HEADER_BYTES + PIXELS] + b"\7" + data[HEADER_BYTES + PIXELS + 1 :],
        "its record does not match its checksum",
    ),
    "no checksum": (header("__metadata__", value={"kind": "mflow images 3"}), "damaged"),
    "a checksum that is a list": (header("__metadata__", "sha256", value=[1]), "its record does"),
    "an earlier version": (
        lambda data: data.replace(b"mflow images 3", b"mflow images 2", 1),
        "was made by another version of mflow prepare; prepare it again with --overwrite",
    ),
}


class TestPreparedFile:
    @pytest.mark.parametrize("case", PREPARED)
    def test_it_is_refused(self, case, whole, tmp_path, capsys):
        damage, message = PREPARED[case]
        path = tmp_path / "a.safetensors"
        path.write_bytes(damage(whole))
        assert path.read_bytes() != whole
        command = ["train", *TINY, "--data", str(path), "--run-dir", str(tmp_path / "run")]
        assert re.search(f"--data: {path} .*{message}", refused(command, tmp_path, capsys))


@pytest.mark.parametrize("name", [".a.journal", ".a.partial"])
def test_a_link_of_its_name_is_refused(name, images, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to("../thesis.tex")
    command = ["prepare", str(images), "--out", str(tmp_path / "out" / "a")]
    assert main(command) == 2
    assert "Too many levels of symbolic links" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
