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


def record(*keys, value):
    """Set one value of the record, and adapt the header to its length."""

    def damage(data):
        values = json.loads(data[HEADER_BYTES + PIXELS + COUNT :])
        set_at(values, keys, value)
        return raw_record(json.dumps(values).encode())(data)

    return damage


def raw_record(text):
    begin = PIXELS + COUNT
    entry = {"dtype": "U8", "shape": [len(text)], "data_offsets": [begin, begin + len(text)]}
    fit = header("record", value=entry)
    return lambda data: fit(data[: HEADER_BYTES + begin] + text)


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
    "a deep record": (raw_record(b"[" * 100_000), "damaged"),
    "a record that is a list": (raw_record(b"[1]"), "damaged"),
    "another version's record": (record("mean", value=1), "missing or unknown fields"),
    "another size": (record("size", value=16), "wrong size"),
    "a size of 8.0": (record("size", value=8.0), "wrong size"),
    "three channels": (record("channels", value=3), "wrong channels"),
    "a negative crop": (record("crop", value=-1), "wrong crop"),
    "no partition": (record("partition", value=None), "wrong partition"),
    "other counts": (record("count", value=[11, 0, 1]), "wrong count"),
    "a name twice": (record("names", 0, value="001.png"), "wrong names"),
    "a name that is a number": (record("names", 0, value=7), "wrong names"),
    "a name of no bytes": (record("names", 0, value="\ud800"), "wrong names"),
    "skipped files in a list": (record("skipped", value=["a"]), "wrong skipped"),
    "more enlarged than there": (record("enlarged", value=13), "wrong enlarged"),
    "digests of numbers": (record("digests", value=[1] * COUNT), "wrong digests"),
    "attributes of no bits": (record("attributes", "Male", value="zzzz"), "wrong attr"),
    "a part of 7": (
        lambda data: data[: HEADER_BYTES + PIXELS] + b"\7" + data[HEADER_BYTES + PIXELS + 1 :],
        "wrong count",
    ),
    "an earlier version": (
        lambda data: data.replace(b"mflow images 2", b"mflow images 1", 1),
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

    def test_the_same_values_change_nothing(self, whole):
        """The helpers of this test damage nothing by themselves."""
        assert record("size", value=8)(whole) == whole


@pytest.mark.parametrize("name", [".a.journal", ".a.partial"])
def test_a_link_of_its_name_is_refused(name, images, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to("../thesis.tex")
    command = ["prepare", str(images), "--out", str(tmp_path / "out" / "a")]
    assert main(command) == 2
    assert "Too many levels of symbolic links" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
