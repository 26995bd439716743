"""Damaged and hostile files: prepared files, journals, images, zips and partitions.

Each is refused with one line and exit code 2, and nothing is written, or it is skipped and listed
with the reason.
"""

import io
import json
import os
import re
import struct
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from tiny_runs import TINY, listing, write_images

from data.waiting import wait_until
from mflow_kernels.data import prepare as preparing
from mflow_kernels.data.decoding import FORMATS, any_in_colour
from mflow_kernels.data.prepare import prepare
from mflow_kernels.data.prepared import HEADER_BYTES, open_prepared
from mflow_kernels.data.sources import DataError, find_images
from mflow_kernels.training.cli import main

COUNT = 12
PIXELS = COUNT * 8 * 8


def check_refused(arguments, message, folder, capsys):
    before = listing(folder)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("mflow: error: ")
    assert re.search(message, err), err
    assert listing(folder) == before


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("faces"), COUNT)


@pytest.fixture(scope="module")
def whole(faces, tmp_path_factory):
    """The bytes of a prepared file of `faces` at 8x8."""
    path = tmp_path_factory.mktemp("whole") / "a"
    prepare(find_images(faces), path, 8)
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
        "its header has the shapes",
    ),
    "a huge shape": (
        with_header(set_at("images", "shape", value=[2**62, 1, 2**40, 2**40])),
        HEADER,
    ),
    "true for 1": (
        with_header(set_at("images", "shape", value=[COUNT, True, 8, 8])),
        "its header has the shapes",
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
    "another version's record": (with_record(set_at("mean", value=1)), "other fields"),
    "another size": (with_record(set_at("size", value=16)), "wrong: size"),
    "a size of 8.0": (with_record(set_at("size", value=8.0)), "wrong: size"),
    "a size of a list": (with_record(set_at("size", value=[8])), "wrong: size"),
    "three channels": (with_record(set_at("channels", value=3)), "wrong: channels"),
    "a negative crop": (with_record(set_at("crop", value=-1)), "wrong: crop"),
    "no partition": (with_record(set_at("partition", value=None)), "wrong: partition"),
    "other counts": (with_record(set_at("count", value=[11, 0, 1])), "wrong: count"),
    "counts of text": (with_record(set_at("count", value="902")), "wrong: count"),
    "a name less": (with_record(lambda record: record["names"].pop() and None), "wrong: names"),
    "a name twice": (with_record(set_at("names", 0, value="001.png")), "wrong: names"),
    "a name that is a number": (with_record(set_at("names", 0, value=7)), "wrong: names"),
    "a name of no bytes": (with_record(set_at("names", 0, value="\ud800")), "wrong: names"),
    "skipped files in a list": (with_record(set_at("skipped", value=["a"])), "wrong: skipped"),
    "more enlarged than there": (with_record(set_at("enlarged", value=13)), "wrong: enlarged"),
    "a digest less": (
        with_record(lambda record: record["digests"].pop() and None),
        "wrong: digests",
    ),
    "digests of numbers": (with_record(set_at("digests", value=[1] * COUNT)), "wrong: digests"),
    "a part of 7": (
        lambda data: data[: HEADER_BYTES + PIXELS] + b"\7" + data[HEADER_BYTES + PIXELS + 1 :],
        "wrong: count",
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
        check_refused(command, f"--data: {path} .*{message}", tmp_path, capsys)

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
    def test_it_is_not_believed(self, case, faces, whole, tmp_path):
        identity = preparing._identity(find_images(faces), 8)
        text = JOURNALS[case].replace("ID", identity)
        (tmp_path / ".a.journal").write_text(text if text.endswith("\n") else text + "\n")
        (tmp_path / ".a.partial").write_bytes(bytes(HEADER_BYTES + PIXELS))
        prepare(find_images(faces), tmp_path / "a", 8)
        assert (tmp_path / "a").read_bytes() == whole
        assert listing(tmp_path) == ["a"]

    @pytest.mark.parametrize("name", [".a.journal", ".a.partial"])
    def test_a_link_of_its_name_is_refused(self, name, faces, tmp_path, capsys):
        (tmp_path / "thesis.tex").write_text("years of work")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).symlink_to("../thesis.tex")
        command = ["prepare", str(faces), "--out", str(tmp_path / "out" / "a")]
        assert main(command) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert (tmp_path / "thesis.tex").read_text() == "years of work"

    def test_another_process_made_it_of_other_images(self, faces, whole, tmp_path, capsys):
        out, journal = tmp_path / "a", tmp_path / ".a.journal"
        other = find_images(write_images(tmp_path / "other", 5))
        raised = []

        def second():
            try:
                prepare(other, out, 8, workers=1, overwrite=False)
            except DataError as error:
                raised.append(str(error))

        with preparing._lock(journal):
            thread = threading.Thread(target=second)
            thread.start()
            wait_until(lambda: "waiting for another process" in capsys.readouterr().err)
            out.write_bytes(whole)
            journal.unlink()
        thread.join()
        assert raised == [f"out: another process has written {out} meanwhile"]
        assert out.read_bytes() == whole
        assert not list(tmp_path.glob(".*"))


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
    for name in ("png", "jpg", "webp", "bmp", "gif", "tiff", "ppm", "pgm"):
        Image.new("L", (8, 8), 128).save(folder / f"good.{name}")
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
    return prepare(find_images(folder), tmp_path_factory.mktemp("out") / "a", 8)


class TestImages:
    """A folder of every kind, prepared once."""

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *((f"good.{name}", 128) for name in ("png", "jpg", "webp", "bmp", "gif", "tiff")),
            *((f"good.{name}", 128) for name in ("ppm", "pgm")),
            ("sixteen.png", 0x80),
            ("sixteen.tif", 0x80),
            ("sixteen.pgm", 0x80),
            ("ten.pgm", 0x80),
            ("twelve.tif", 0x80),
            ("inverted.tif", 0x7F),
            ("pages.tif", 128),
        ],
    )
    def test_read(self, name, value, kinds):
        assert (kinds.images[kinds.record.names.index(name)] == value).all()

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("float.tif", "no agreed white"),
            ("float.pfm", "no agreed white"),
            ("int32.tif", "no agreed white"),
            ("script.eps", "not an image in one of the formats PNG, JPEG, WEBP"),
            ("other.tga", "not an image in one of the formats"),
            ("torn.png", "truncated"),
            ("empty.png", "not an image in one of the formats"),
            ("huge.png", "decompression bomb"),
        ],
    )
    def test_skipped_with_the_reason(self, name, reason, kinds):
        assert reason in kinds.record.skipped[name]

    def test_nothing_else_was_looked_at(self, kinds):
        assert len(kinds.record.names) == 15
        assert len(kinds.record.skipped) == 8

    @pytest.mark.parametrize("name", ["float.tif", "int32.tif", "sixteen.tif", "float.pfm"])
    def test_grey_of_any_depth_is_no_colour(self, name, kinds):
        folder = Path(kinds.record.source)
        assert not any_in_colour([e for e in find_images(folder).entries if e.name == name])

    def test_formats_are_among_pillows(self):
        Image.init()
        assert set(FORMATS) <= set(Image.OPEN)


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
        for name in (
            "deflate64",
            "method99",
            "encrypted",
            "crc",
            "offset",
            "longer",
            "shorter",
        ):
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
        return prepare(find_images(archive), tmp_path_factory.mktemp("out") / "a", 8)


class TestZip:
    """A zip of every kind of member, prepared once."""

    def test_read(self, members):
        names = ["../outside.png", "/absolute.png", "lzma.png", "twice.png"]
        assert members.record.names == names
        assert (members.images == 128).all()

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("deflate64", "compression method"),
            ("method99", "compression method"),
            ("encrypted", "encrypted, password required"),
            ("crc", "Bad CRC-32"),
            ("offset", ""),
            ("longer", ""),
            ("shorter", "Bad CRC-32"),
            ("bad-lzma", ""),
            ("bad-bzip2", ""),
            ("bad-deflate", ""),
            ("bomb", "inflates to more than 1 MiB"),
            ("\x1b[2J", "not an image"),
        ],
    )
    def test_skipped_with_the_reason(self, name, reason, members):
        assert reason in members.record.skipped[f"{name}.png"]
        assert members.record.skipped[f"{name}.png"]

    def test_nothing_else(self, members):
        assert len(members.record.skipped) == 12

    def test_no_name_reaches_the_terminal_raw(self, archive, tmp_path, capsys):
        assert main(["prepare", str(archive), "--out", str(tmp_path / "a")]) == 0
        shown = "".join(capsys.readouterr())
        assert "\x1b" not in shown
        assert "\\x1b[2J.png: not an image" in shown
        assert listing(tmp_path) == ["a"]

    def test_one_whose_beginning_is_missing(self, archive, tmp_path):
        """Its table of contents is whole, and the members that are missing are skipped."""
        (tmp_path / "a.zip").write_bytes(archive.read_bytes()[600:])
        prepared = prepare(find_images(tmp_path / "a.zip"), tmp_path / "a", 8)
        assert "method99.png" in prepared.record.skipped
        assert "twice.png" in prepared.record.names
        assert (prepared.images == 128).all()

    def test_a_zip_of_none_that_can_be_read(self, tmp_path, capsys):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
            file.writestr("\x1b[31mred.png", "no image")
        command = ["prepare", str(tmp_path / "a.zip"), "--out", str(tmp_path / "a")]
        message = r"found 1 files that are none \(\\x1b\[31mred.png: not an image in"
        check_refused(command, message, tmp_path, capsys)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: data[:-1],
            lambda data: data[: len(data) // 2],
            lambda data: data[:-22] + b"PK\5\6" + b"\xff" * 18,
            lambda data: data.replace(b"PK\1\2\x14\3\x14", b"PK\1\2\x14\3\xff"),  # version 25.5
            lambda data: data.replace(b"PK\1\2", b"PK\0\0"),
            lambda data: b"PK\5\6" + bytes(18),  # whole, and empty
            lambda data: b"",
        ],
    )
    def test_a_table_of_contents_that_is_torn_or_lies(self, damage, archive, tmp_path, capsys):
        (tmp_path / "a.zip").write_bytes(damage(archive.read_bytes()))
        command = ["prepare", str(tmp_path / "a.zip"), "--out", str(tmp_path / "a")]
        check_refused(command, "data: expected", tmp_path, capsys)


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
        check_refused(command, f"{named}.*{message}", tmp_path, capsys)

    def test_the_same_line_twice_and_a_mark_of_byte_order(self, celeba):
        text = PARTITION + PARTITION.replace("\n", "\r\n")
        (celeba / "list_eval_partition.txt").write_text(text, "utf-8-sig")
        assert find_images(celeba).parts == [0, 1, 2]

    def test_two_files_of_a_listed_name(self, celeba, tmp_path, capsys):
        (celeba / "list_eval_partition.txt").write_text(PARTITION)
        write_images(celeba / "img_align_celeba" / "more", 1, (178, 218), channels=3, seed=1)
        message = "expected one file 000.png in .*, found 000.png and more/000.png"
        command = ["prepare", str(celeba), "--out", str(tmp_path / "a")]
        check_refused(command, message, tmp_path, capsys)


class TestFolders:
    def test_one_that_cannot_be_listed_is_not_left_out(self, faces, tmp_path, monkeypatch, capsys):
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
        check_refused(command, f"{closed}.*Permission denied", tmp_path, capsys)

    def test_names_that_are_too_long_or_no_text(self, faces, tmp_path, capsys):
        for out in ("x" * 300, "x" * 250, "a" + os.fsdecode(b"\xff") + "/b"):
            command = ["prepare", str(faces), "--out", str(tmp_path / out)]
            check_refused(command, "", tmp_path, capsys)
        named = tmp_path / ("n" * 250)
        write_images(named, 2)
        command = ["train", *TINY, "--levels", "9", "--data", str(named)]
        check_refused([*command, "--run-dir", str(tmp_path / "run")], "--levels", tmp_path, capsys)

    def test_bytes_that_are_no_utf_8(self, tmp_path, capsys):
        folder = tmp_path / os.fsdecode(b"\xff\xfe")
        write_images(folder, 3)
        (folder / "000.png").rename(folder / os.fsdecode(b"\x80.png"))
        (folder / os.fsdecode(b"\x81.png")).write_text("no image")
        out = tmp_path / os.fsdecode(b"\xff.safetensors")
        assert main(["prepare", str(folder), "--out", str(out)]) == 0
        assert "\\udc81.png: not an image" in capsys.readouterr().out
        assert os.fsdecode(b"\x80.png") in open_prepared(out).record.names
        # A run could not record that path in a form that can be read back.
        command = ["train", *TINY, "--data", str(folder), "--run-dir", str(tmp_path / "run")]
        check_refused(command, "--data: expected a path that is valid UTF-8", tmp_path, capsys)
