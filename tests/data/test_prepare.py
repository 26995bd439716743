import errno
import itertools
import json
import os
import shutil
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_runs import TINY, listing, refused, spy, write_images

from benchmarks.celeba.fake_celeba import make_celeba
from mflow_kernels.data import journal
from mflow_kernels.data import prepare as preparing
from mflow_kernels.data.decoding import Format, decode
from mflow_kernels.data.journal import lock_journal, write_at
from mflow_kernels.data.prepare import is_prepared_from, prepare_images
from mflow_kernels.data.prepared import open_prepared
from mflow_kernels.data.sources import DataError, find_images
from mflow_kernels.training.cli import main

COUNT = 20


def wait_until(holds):
    """Wait until `holds()` is true. Fail after ten minutes, more than any machine needs."""
    for _ in range(60_000):
        if holds():
            return
        time.sleep(0.01)
    pytest.fail("waited for ten minutes")


@pytest.fixture(scope="module")
def celeba(tmp_path_factory):
    """Twenty images of CelebA's size, one of them torn."""
    folder = make_celeba(tmp_path_factory.mktemp("data") / "celeba", COUNT)
    torn = folder / "img_align_celeba" / "000005.jpg"
    torn.write_bytes(torn.read_bytes()[:900])
    return folder


@pytest.fixture(scope="module")
def source(celeba):
    return find_images(celeba)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, source):
    """The bytes that every prepared file of `source` at 16x16 must have."""
    path = tmp_path_factory.mktemp("whole") / "a.safetensors"
    prepare_images(source, path, 16, workers=1)
    return path.read_bytes()


@pytest.mark.parametrize("workers", [2, None])
def test_threads_do_not_change_the_file(workers, source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "_BLOCK", 3)
    prepare_images(source, tmp_path / "a", 16, workers)
    assert (tmp_path / "a").read_bytes() == whole
    assert listing(tmp_path) == ["a"]


class TestFile:
    def test_each_row_is_its_image(self, source, tmp_path):
        prepared = prepare_images(source, tmp_path / "a", 16)
        names = [entry.name for entry in source.entries if entry.name != "000005.jpg"]
        assert prepared.record.names == names
        by_name = {entry.name: entry for entry in source.entries}
        for row, name in zip(prepared.images, names, strict=True):
            alone = decode(by_name[name], Format(16, 3, 148))[0]
            assert np.array_equal(row, alone)
        assert isinstance(prepared.images, np.memmap)
        assert not prepared.images.flags.writeable

    def test_other_programs_can_read_it(self, source, celeba, tmp_path):
        prepared = prepare_images(source, tmp_path / "a", 16)
        loaded = load_file(tmp_path / "a")
        assert np.array_equal(loaded["images"], prepared.images)
        assert np.array_equal(loaded["part"], prepared.part)
        record = json.loads(loaded["record"].tobytes())
        assert (record["partition"], record["count"]) == ("official", [15, 2, 2])
        assert (record["size"], record["crop"], record["enlarged"]) == (16, 148, 0)
        assert list(record["skipped"]) == ["000005.jpg"]
        assert record["source"] == str(celeba)
        assert prepare_images(source, tmp_path / "b", 150).record.enlarged == COUNT - 1

    def test_other_images_or_another_size_are_recognized(self, celeba, tmp_path):
        folder = shutil.copytree(celeba, tmp_path / "celeba")
        prepare_images(find_images(folder), tmp_path / "a", 16)
        assert is_prepared_from(tmp_path / "a", find_images(folder), 16)
        assert not is_prepared_from(tmp_path / "a", find_images(folder), 8)
        image = folder / "img_align_celeba" / "000001.jpg"
        os.utime(image, ns=(0, 0))
        assert not is_prepared_from(tmp_path / "a", find_images(folder), 16)


class Killed(BaseException):
    """An error that nothing in the package catches, like the death of the process."""


@contextmanager
def stops_at_write(number, error):
    """Raise `error` at a write, counted from 0, after half of its bytes. The first one is of the
    journal's first line; each image takes two, for itself and its line."""
    calls = itertools.count()

    def failing(file, data, place):
        if next(calls) == number:
            write_at(file, data[: len(data) // 2], place)
            raise error
        write_at(file, data, place)

    with pytest.MonkeyPatch.context() as patch:
        for module in (journal, preparing):
            patch.setattr(module, "write_at", failing)
        yield


class TestInterrupted:
    @staticmethod
    def stop(source, out, write=20):
        with stops_at_write(write, Killed), pytest.raises(Killed):
            prepare_images(source, out, 16, workers=1)
        assert not out.exists()

    def test_at_every_write(self, source, whole, tmp_path):
        """Closing the gap of the torn image takes 15 writes, and the end two."""
        for write in range(1 + 2 * 19 + 15 + 2):
            out = tmp_path / str(write) / "a"
            out.parent.mkdir()
            self.stop(source, out, write)
            prepare_images(source, out, 16, workers=1)
            assert out.read_bytes() == whole
            assert listing(out.parent) == ["a"]

    @pytest.mark.parametrize(
        ("name", "damage"),
        [
            pytest.param(".a.journal", lambda data: data[:-25], id="torn journal"),
            pytest.param(".a.journal", lambda data: data + b"\xff[" * 40, id="garbage after it"),
            pytest.param(".a.journal", lambda data: b"[" * len(data), id="garbage"),
            pytest.param(".a.journal", lambda data: bytes(len(data)), id="zeros"),
            pytest.param(".a.journal", lambda data: data.replace(b" 3\n", b" 2\n"), id="channels"),
            pytest.param(".a.partial", lambda data: data + b"half an image", id="longer"),
            pytest.param(".a.partial", lambda data: data[: 4096 + 7 * 768 - 5], id="shorter"),
            pytest.param(".a.partial", lambda data: data[:4999] + b"?" + data[5000:], id="rotten"),
        ],
    )
    def test_what_a_power_cut_damaged_is_decoded_again(self, name, damage, source, whole, tmp_path):
        self.stop(source, tmp_path / "a")
        path = tmp_path / name
        before = path.read_bytes()
        path.write_bytes(damage(before))
        assert path.read_bytes() != before
        prepare_images(source, tmp_path / "a", 16, workers=1)
        assert (tmp_path / "a").read_bytes() == whole

    def test_written_images_are_not_decoded_again(self, source, tmp_path, monkeypatch):
        self.stop(source, tmp_path / "a")  # in the line of the tenth image; the fifth is torn
        decoded = []
        spy(monkeypatch, preparing, "decode", lambda entry, _: decoded.append(entry))
        prepare_images(source, tmp_path / "a", 16, workers=1)
        assert decoded == [source.entries[4], *source.entries[10:]]

    def test_another_set_starts_again(self, source, tmp_path):
        self.stop(source, tmp_path / "a")
        other = find_images(write_images(tmp_path / "other", 6, channels=3))
        assert prepare_images(other, tmp_path / "a", 16).record.count == [5, 0, 1]

    @pytest.mark.parametrize("same", [True, False])
    def test_a_second_process_waits_for_the_first(self, same, source, whole, tmp_path, capsys):
        out, path, raised = tmp_path / "a", tmp_path / ".a.journal", []
        images = source if same else find_images(write_images(tmp_path / "other", 5))

        def prepare():
            try:
                prepare_images(images, out, 16, workers=1, overwrite=False)
            except DataError as error:
                raised.append(str(error))

        with lock_journal(path):
            second = threading.Thread(target=prepare)
            second.start()
            wait_until(lambda: "waiting for another process" in capsys.readouterr().err)
            out.write_bytes(whole)  # the first one is done now
            before = out.stat().st_ino
            path.unlink()
        second.join()
        refusal = f"out: another process wrote {out} while this one waited"
        assert raised == ([] if same else [refusal])
        assert out.stat().st_ino == before  # not made again
        assert out.read_bytes() == whole
        assert not list(tmp_path.glob(".*"))


class TestDiskFull:
    def test_a_full_disk_is_foreseen(self, celeba, tmp_path, monkeypatch, capsys):
        """That of the prepared file, or of the cache of images that a run prepares."""
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 100))
        out = tmp_path / "a"
        prepare = ["prepare", str(celeba), "--out", str(out)]
        assert f"no space left for {out}" in refused(prepare, tmp_path, capsys, code=1)
        train = ["train", *TINY, "--data", str(celeba), "--run-dir", str(out)]
        assert "no space left" in refused(train, tmp_path, capsys, code=1)

    def test_a_disk_that_fills_up_later(self, celeba, whole, tmp_path, capsys):
        out = tmp_path / "a"
        command = ["prepare", str(celeba), "--out", str(out), "--image-size", "16"]
        full = OSError(errno.ENOSPC, "No space left on device")
        with stops_at_write(20, full):
            assert main([*command, "--workers", "1"]) == 1
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert "repeat the command, which then continues from .a.partial" in message
        assert listing(tmp_path) == [".a.journal", ".a.partial"]
        assert main([*command, "--workers", "1"]) == 0
        assert out.read_bytes() == whole


class TestCommand:
    def test_it_finds_a_changed_byte_in_its_file(self, whole, celeba, tmp_path, capsys):
        file, data = tmp_path / "a.safetensors", bytearray(whole)
        data[4096 + 9 * 3 * 16 * 16] ^= 1  # in the tenth image: the third block
        file.write_bytes(data)
        command = ["prepare", str(celeba), "--out", str(file), "--image-size", "16"]
        assert main(command) == 2
        assert "image 9 (000011.jpg) does not match its digest" in capsys.readouterr().err
        assert main([*command, "--overwrite"]) == 0
        assert main(command) == 0
        assert "every image is intact" in capsys.readouterr().out

    def test_train_and_evaluate_from_the_file(self, celeba, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        command = ["prepare", str(celeba), "--out", "tiny.safetensors", "--image-size", "8"]
        assert main(command) == 0
        message = capsys.readouterr().out
        assert "19 images of 3x8x8" in message
        assert "15 train, 2 valid, 2 test (official partition)" in message
        assert "skipped 1 files" in message
        assert "  000005.jpg: " in message
        tiny = [*TINY, "--data", "tiny.safetensors", "--run-dir", "run", "--flips"]
        assert main(["train", *tiny]) == 0
        flipped = (tmp_path / "run" / "metrics.csv").read_text().split("\n")[1].split(",")[2]
        assert main(["train", *tiny[:-1], "--overwrite"]) == 0
        loss = (tmp_path / "run" / "metrics.csv").read_text().split("\n")[1].split(",")[2]
        assert float(flipped) != float(loss)
        assert main(["evaluate", "run", "--quick", "--data", "tiny.safetensors"]) == 0
        assert main(["train", *TINY, "--data", "tiny.safetensors", "--image-size", "16"]) == 2
        message = "--data: expected images of 16x16 pixels, got 8x8 in tiny.safetensors"
        assert message in capsys.readouterr().err

    def test_a_link_stays_and_leads_to_the_new_file(self, tmp_path):
        write_images(tmp_path / "images", 2)
        (tmp_path / "disk").mkdir()
        link = tmp_path / "link"
        link.symlink_to("disk/made")
        command = ["prepare", str(tmp_path / "images"), "--out", str(link), "--image-size"]
        assert main([*command, "8"]) == 0
        assert main([*command, "4", "--overwrite"]) == 0
        assert link.is_symlink()
        assert open_prepared(tmp_path / "disk" / "made").record.size == 4
        assert listing(tmp_path / "disk") == ["made"]
        assert not list(tmp_path.glob(".*"))
