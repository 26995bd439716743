"""Damaged prepared files and journals.

A damaged prepared file is refused with one line and exit code 2. A damaged journal is ignored.
"""

import json
import re
import struct
import threading

import pytest
from tiny_runs import TINY, listing, refused, write_images

from data.waiting import wait_until
from mflow_kernels.data import prepare as preparing
from mflow_kernels.data.journal import lock_journal
from mflow_kernels.data.prepare import prepare_images
from mflow_kernels.data.prepared import HEADER_BYTES
from mflow_kernels.data.sources import DataError, find_images
from mflow_kernels.training.cli import main

COUNT = 12
PIXELS = COUNT * 8 * 8


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The bytes of a prepared file of `images`, which are 8x8."""
    path = tmp_path_factory.mktemp("whole") / "a"
    prepare_images(find_images(images), path, 8)
    return path.read_bytes()


def with_header(change):
    """Change the entries of a prepared file's header and nothing else."""

    def damage(data):
        entries = json.loads(data[8:HEADER_BYTES])
        change(entries)
        text = json.dumps(entries).encode().ljust(HEADER_BYTES - 8)
        return struct.pack("<Q", len(text)) + text + data[HEADER_BYTES:]

    return damage


def with_record(change):
    """Change the record of a prepared file, and adapt its header."""

    def damage(data):
        record = json.loads(data[HEADER_BYTES + PIXELS + COUNT :])
        changed = change(record)
        text = json.dumps(record if changed is None else changed).encode()
        return with_raw_record(text)(data)

    return damage


def with_raw_record(text):
    def damage(data):
        def fit(entries):
            begin = PIXELS + COUNT
            entries["record"].update(shape=[len(text)], data_offsets=[begin, begin + len(text)])

        return with_header(fit)(data[: HEADER_BYTES + PIXELS + COUNT] + text)

    return damage


def set_at(*keys, value):
    def change(entries):
        for key in keys[:-1]:
            entries = entries[key]
        entries[keys[-1]] = value

    return change


HEADER = r"its header is not one that mflow prepare writes"
PREPARED = {
    "an offset before the images": (
        with_header(set_at("images", "data_offsets", value=[-4000, PIXELS - 4000])),
        HEADER,
    ),
    "offsets swapped": (with_header(set_at("part", "data_offsets", value=[0, COUNT])), HEADER),
    "floats": (with_header(set_at("images", "dtype", value="F32")), HEADER),
    "100 parts": (with_header(set_at("part", "shape", value=[100])), HEADER),
    "a negative shape": (
        with_header(set_at("images", "shape", value=[-12, 1, 8, 8])),
        "its header lists the shapes",
    ),
    "a huge shape": (
        with_header(set_at("images", "shape", value=[2**62, 1, 2**40, 2**40])),
        HEADER,
    ),
    "true for 1": (
        with_header(set_at("images", "shape", value=[COUNT, True, 8, 8])),
        "its header lists the shapes",
    ),
    "other axes": (with_header(set_at("images", "shape", value=[COUNT, 64])), "damaged"),
    "no shapes": (with_header(lambda entries: entries.pop("record")), "damaged"),
    "two more tensors": (with_header(set_at("more", value={})), HEADER),
    "a deep header": (
        lambda data: data[:80] + b"[" * (HEADER_BYTES - 80) + data[HEADER_BYTES:],
        "damaged",
    ),
    "a header's length that lies": (lambda data: b"\xff" * 8 + data[8:], HEADER),
    "one byte less": (lambda data: data[:-1], "its length does not agree with its header"),
    "one byte more": (lambda data: data + b" ", "its length does not agree with its header"),
    "the header alone": (lambda data: data[:HEADER_BYTES], "its length"),
    "half a header": (lambda data: data[:200], "damaged"),
    "a deep record": (with_raw_record(b"[" * 100_000), "damaged"),
    "a record of bytes": (with_raw_record(b"\xff\x00\x80"), "damaged"),
    "a record that is a list": (with_record(lambda record: [record]), "damaged"),
    "another version's record": (with_record(set_at("mean", value=1)), "missing or unknown fields"),
    "another size": (with_record(set_at("size", value=16)), "wrong size"),
    "a size of 8.0": (with_record(set_at("size", value=8.0)), "wrong size"),
    "a size of a list": (with_record(set_at("size", value=[8])), "wrong size"),
    "three channels": (with_record(set_at("channels", value=3)), "wrong channels"),
    "a negative crop": (with_record(set_at("crop", value=-1)), "wrong crop"),
    "no partition": (with_record(set_at("partition", value=None)), "wrong partition"),
    "other counts": (with_record(set_at("count", value=[11, 0, 1])), "wrong count"),
    "counts of text": (with_record(set_at("count", value="902")), "wrong count"),
    "a name less": (with_record(lambda record: record["names"].pop() and None), "wrong names"),
    "a name twice": (with_record(set_at("names", 0, value="001.png")), "wrong names"),
    "a name that is a number": (with_record(set_at("names", 0, value=7)), "wrong names"),
    "a name of no bytes": (with_record(set_at("names", 0, value="\ud800")), "wrong names"),
    "skipped files in a list": (with_record(set_at("skipped", value=["a"])), "wrong skipped"),
    "more enlarged than there": (with_record(set_at("enlarged", value=13)), "wrong enlarged"),
    "a digest less": (
        with_record(lambda record: record["digests"].pop() and None),
        "wrong digests",
    ),
    "digests of numbers": (with_record(set_at("digests", value=[1] * COUNT)), "wrong digests"),
    "attributes of no bits": (
        with_record(set_at("attributes", "Male", value="zzzz")),
        "wrong attr",
    ),
    "attributes of a byte": (with_record(set_at("attributes", "Male", value="ff")), "wrong attr"),
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

    def test_rebuilding_it_changes_nothing(self, whole):
        """The helpers of this test change nothing by themselves."""
        assert with_record(lambda record: None)(whole) == whole


GOOD_LINE = json.dumps({"end": 3, "skipped": {}, "enlarged": 0, "digests": ["0" * 16] * 3})
JOURNALS = {
    "{}": "{}\n",
    "a list": "[]\n",
    "null": "null\n",
    "deep": "[" * 100_000 + "\n",
    "no text": "\0\1\2\n",
    "two channels": '{"identity": "ID", "channels": 2}\n',
    "channels of a list": '{"identity": "ID", "channels": [1]}\n',
    "{} after the first": '{"identity": "ID", "channels": 1}\n{}\n',
    "an end that lies": '{"identity": "ID", "channels": 1}\n' + GOOD_LINE.replace("3", "300", 1),
    "a negative end": '{"identity": "ID", "channels": 1}\n' + GOOD_LINE.replace("3", "-3", 1),
    "a skipped file elsewhere": '{"identity": "ID", "channels": 1}\n'
    + GOOD_LINE.replace("{}", '{"9": "torn"}').replace('"end": 3', '"end": 4'),
    "skipped files in a list": '{"identity": "ID", "channels": 1}\n'
    + GOOD_LINE.replace("{}", "[]"),
    "digests of numbers": '{"identity": "ID", "channels": 1}\n'
    + GOOD_LINE.replace('"' + "0" * 16 + '"', "7"),
    "text for a number": '{"identity": "ID", "channels": 1}\n'
    + GOOD_LINE.replace('"enlarged": 0', '"enlarged": "0"'),
}


class TestJournal:
    @pytest.mark.parametrize("case", JOURNALS)
    def test_a_damaged_one_is_ignored(self, case, images, whole, tmp_path):
        identity = preparing._identity(find_images(images), 8)
        text = JOURNALS[case].replace("ID", identity)
        (tmp_path / ".a.journal").write_text(text if text.endswith("\n") else text + "\n")
        (tmp_path / ".a.partial").write_bytes(bytes(HEADER_BYTES + PIXELS))
        prepare_images(find_images(images), tmp_path / "a", 8)
        assert (tmp_path / "a").read_bytes() == whole
        assert listing(tmp_path) == ["a"]

    @pytest.mark.parametrize("name", [".a.journal", ".a.partial"])
    def test_a_link_of_its_name_is_refused(self, name, images, tmp_path, capsys):
        (tmp_path / "thesis.tex").write_text("years of work")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).symlink_to("../thesis.tex")
        command = ["prepare", str(images), "--out", str(tmp_path / "out" / "a")]
        assert main(command) == 2
        assert "Too many levels of symbolic links" in capsys.readouterr().err
        assert (tmp_path / "thesis.tex").read_text() == "years of work"

    def test_another_process_made_it_of_other_images(self, images, whole, tmp_path, capsys):
        out, journal = tmp_path / "a", tmp_path / ".a.journal"
        other = find_images(write_images(tmp_path / "other", 5))
        raised = []

        def second():
            try:
                prepare_images(other, out, 8, workers=1, overwrite=False)
            except DataError as error:
                raised.append(str(error))

        with lock_journal(journal):
            thread = threading.Thread(target=second)
            thread.start()
            wait_until(lambda: "waiting for another process" in capsys.readouterr().err)
            out.write_bytes(whole)
            journal.unlink()
        thread.join()
        assert raised == [f"out: another process wrote {out} while this one waited"]
        assert out.read_bytes() == whole
        assert not list(tmp_path.glob(".*"))
